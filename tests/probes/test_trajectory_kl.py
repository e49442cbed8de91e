"""Movement of the predictions: recorded right, and nothing of the training changed by it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import monitor
from monitor.errors import UsageError
from monitor.probes import TrajectoryKL
from monitor.probes.trajectory_kl import ROWS, moved
from tests.record import trainings


def test_closed_form() -> None:
    """Oracle: closed form. (½, ¼, ¼) against (¼, ¼, ½) is ¼ ln 2; τ log p at temperature τ is p; NaN stays NaN."""
    p, q = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.25, 0.5]]).log()
    assert moved(p, q, 1.0) == pytest.approx((math.log(2) / 4, 1))
    assert moved(5 * p + 3, 5 * q, 5.0) == pytest.approx((math.log(2) / 4, 1))
    assert moved(p, p + 7, 1.0) == pytest.approx((0, 0), abs=1e-7)
    masked = [F.pad(z, (0, 1), value=-math.inf) for z in (p, q)]
    assert moved(masked[0], masked[1], 1.0) == pytest.approx((math.log(2) / 4, 1))
    assert all(math.isnan(x) for x in moved(p, q * math.nan, 1.0))


@pytest.mark.parametrize("gap", [1, 2])
def test_naive_divergence(gap: int, tmp_path: Path) -> None:
    """Oracle: naive transcription, in float64 from softmax to sum, on a copy with dropout off at every step."""
    trainings.seed()
    model, twin = trainings.mlp(), trainings.mlp().eval()
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scores: list[Tensor] = []
    first = torch.empty(0)
    probe = TrajectoryKL(gap=gap, temperature=2.0, every=2)
    with monitor.attach(model, tmp_path / "run", probes=[probe]):
        for x, y in trainings.batches(7):
            first = first if scores else x.clone()
            twin.load_state_dict(model.state_dict())
            scores.append(twin(first).detach().double())
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            x.zero_()  # the batch is the script's own
            opt.step()
    run = monitor.open(tmp_path / "run")
    assert not run.warnings
    steps, values = run.series("trajectory_kl.kl")
    assert steps.tolist() == list(range(2 * gap, 7, 2))
    for step, value in zip(steps, values, strict=True):
        p, q = ((scores[at] / 2).softmax(1) for at in (step - 2 * gap, step))
        assert value == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-4)
    assert run.series("trajectory_kl.steps")[1].tolist() == [2 * gap] * len(steps)
    changed = (scores[0].argmax(1) != scores[2 * gap].argmax(1)).double().mean()
    assert run.series("trajectory_kl.changed")[1][0] == pytest.approx(float(changed))


def test_sequences_and_padding(tmp_path: Path) -> None:
    """Oracle: dense reference. Positions that do not count are left out, of the rest every third is taken."""
    trainings.seed()
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 16))
    tokens = torch.randint(0, 16, (20, 40))
    target = tokens.roll(-1, 1)
    target[:, 30:] = -100
    opt = torch.optim.SGD(model.parameters(), lr=5.0)
    seen: list[Tensor] = []
    with monitor.attach(model, tmp_path / "run", probes=[TrajectoryKL(every=1, temperature=1.0)]):
        for _ in range(2):
            z = model(tokens)
            seen.append(z.detach()[:, :30].reshape(-1, 16)[::3])
            opt.zero_grad()
            F.cross_entropy(z.transpose(1, 2), target).backward()
            opt.step()
    run = monitor.open(tmp_path / "run")
    assert run.series("trajectory_kl.rows")[1].tolist() == [200]
    assert len(seen[0]) == 200 <= ROWS
    expected = F.kl_div(seen[1].log_softmax(1), seen[0].log_softmax(1), log_target=True, reduction="batchmean")
    assert run.series("trajectory_kl.kl")[1][0] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("inputs", [True, False])
def test_a_loss_without_classes(inputs: bool, tmp_path: Path) -> None:
    """Oracle: planted fault. A squared error has no scores: absent with a reason, or measured on given inputs."""
    trainings.seed()
    model = trainings.mlp()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = TrajectoryKL(torch.randn(9, 12) if inputs else None, every=1)
    with monitor.attach(model, tmp_path / "run", probes=[probe]):
        for x, _ in trainings.batches(3):
            opt.zero_grad()
            model(x).square().mean().backward()
            opt.step()
    run = monitor.open(tmp_path / "run")
    if inputs:
        assert run.series("trajectory_kl.rows")[1].tolist() == [9, 9] and not run.warnings
        assert (run.series("trajectory_kl.kl")[1] > 0).all()
    else:
        (why,) = [a["why"] for a in run.info["absent"] if a["what"] == "trajectory_kl"]
        assert "pass inputs=" in why and "trajectory_kl.kl" not in run.refs()


def test_a_probe_that_is_used_again_remembers_nothing(tmp_path: Path) -> None:
    """Oracle: invariance. The second run with one probe gives what it gives with a fresh one."""
    probe, seen = TrajectoryKL(every=1), []
    for given in (probe, probe, TrajectoryKL(every=1)):
        trainings.plain(lambda m, p=given: monitor.attach(m, tmp_path / f"{len(seen)}", probes=[p]))
        monitor.record.attach.close_all()
        seen.append(monitor.open(tmp_path / f"{len(seen)}").series("trajectory_kl.kl")[1].tolist())
    assert seen[0] == seen[1] == seen[2] and len(seen[0]) > 2


@pytest.mark.parametrize("wrong", [{"gap": 0}, {"temperature": 0.0}, {"temperature": math.inf}])
def test_wrong_options_are_named(wrong: dict[str, Any]) -> None:
    """Oracle: planted fault."""
    with pytest.raises(UsageError, match=next(iter(wrong))):
        TrajectoryKL(**wrong)
