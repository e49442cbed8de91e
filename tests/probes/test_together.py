"""Probes where two real processes train together: the first measures, alone, and nothing changes for either."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import monitor
from monitor.record import processes
from tests.probes.curvature.runs import column

ROOT = Path(__file__).resolve().parents[2]
#: Trainings of which the curvature is measured at step 0, 3 and 6.
MEASURED = (
    "plain", "accumulated", "autocast", "views", "static", "unused", "halved", "wrapper", "oracle", "closure",
    "closures",
)  # fmt: skip
#: Others, with the steps at which it is measured; or what is said.
INNER, PAIR = [3, 6], [0, 3, 6]
REFUSED = {
    "gathering": "Gathering calls allreduce of torch.distributed, in which all processes must take part; measure",
    "gathered": "a function that computes it without what other processes know",
    "by_hand": "several processes train together without DistributedDataParallel",
}
KINDS = (*MEASURED, *REFUSED, "inner", "pair", "others")


def together(module: str, folder: Path, arguments: Sequence[str], count: int = 2) -> list[str]:
    """What so many processes that run ``module`` print."""
    meeting = folder / "meeting"  # a file, since any port may be taken
    started = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(meeting), str(folder), *arguments], cwd=ROOT, text=True,
            env=os.environ | {"RANK": str(r), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for r in range(count)
    ]  # fmt: skip
    try:
        said = [p.communicate(timeout=240) for p in started]
    finally:
        for p in started:
            p.kill()  # one that waits for another that has failed
    assert all(p.returncode == 0 for p in started), "\n".join(err for _, err in said)
    return [line for out, _ in said for line in out.splitlines() if line.startswith("rank")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where every kind of training has been recorded."""
    folder = tmp_path_factory.mktemp("together")
    lines = together("tests.probes.together", folder, KINDS)
    # the first of all: whatever else is wrong, the training is as it was
    said = ("silent but for []", *(f"{kind} same" for kind in KINDS))
    assert sorted(lines) == sorted(f"rank {rank} {line}" for rank in range(2) for line in said)
    return folder


def why(run: monitor.Run) -> str:
    """What is said about curvature."""
    return next((a["why"] for a in run.info["absent"] if a["what"] == "curvature"), "")


@pytest.mark.parametrize("kind", MEASURED)
def test_measured(kind: str, folder: Path) -> None:
    """Oracle: invariance. Hash of parameters, momenta, losses, buffers and generators of both, with and without."""
    run = monitor.open(folder / kind)
    assert run.series("sharpness.value")[0].tolist() == [0, 3, 6]
    assert (run.series("sharpness.converged")[1] == 1).all()
    assert run.series("spectral_density.nodes")[0].tolist() in ([0, 6], [0])
    assert not run.warnings
    said = "that of the batch of all 2 processes: recorded is that of the first one's part"
    assert why(run).startswith(said) == (kind != "wrapper")


def test_the_model_alone_was_given(folder: Path) -> None:
    """Oracle: definition. What the wrapper does to outputs is known from the second step on."""
    run, control = monitor.open(folder / "inner"), monitor.open(folder / "unused")
    steps, values = run.series("sharpness.value")
    assert steps.tolist() == INNER
    np.testing.assert_allclose(values, control.series("sharpness.value")[1][1:], rtol=1e-3)


@pytest.mark.parametrize(("inside", "outside"), [("closure", "plain"), ("closures", "accumulated")])
def test_a_closure(inside: str, outside: str, folder: Path) -> None:
    """Oracle: invariance. Whether forward and backward run before the optimizer's step or inside it."""
    run, control = monitor.open(folder / inside), monitor.open(folder / outside)
    for ref in ("sharpness.value", "batch_sharpness.gradient_norm", "loss.value"):
        np.testing.assert_allclose(run.series(ref)[1], control.series(ref)[1], rtol=1e-4, err_msg=ref)


@pytest.mark.slow
def test_lightning(tmp_path: Path) -> None:
    """Oracle: invariance. What Lightning logs, parameters and optimizer states of both, with and without."""
    pytest.importorskip("lightning")
    lines = together("tests.probes.together", tmp_path, ["lightning"])
    assert sorted(lines)[0::2] == [f"rank {rank} lightning same" for rank in range(2)]
    run = monitor.open(tmp_path / "lightning")
    assert run.series("sharpness.value")[0].tolist() == [0, 3, 6]
    assert column(run, "sharpness.examples") == [16] * 3
    assert set(column(run, "loss.micro_steps")) == {2}
    assert len(column(run, "clip.coefficient")) == 7
    assert not run.warnings


def test_two_wrapped_models(folder: Path) -> None:
    """Oracle: definition. Parts of one model that are wrapped by themselves."""
    assert monitor.open(folder / "pair").series("sharpness.value")[0].tolist() == PAIR


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind: str, folder: Path) -> None:
    """Oracle: planted fault. What one process cannot compute alone is not measured, in one line, and nobody waits."""
    run = monitor.open(folder / kind)
    assert run.steps == 7
    assert not run.modules("sharpness.value")
    assert REFUSED[kind] in why(run)


@pytest.mark.parametrize("step", [0, 3, 6])
def test_against_the_dense_hessian(step: int, folder: Path) -> None:
    """Oracle: dense float64 reference of the first process's two micro-batches, by torch.func and autograd.functional.

    With batch statistics, two micro-batches of which one is not averaged, and gradients clipped to .1.
    """
    run, reference = monitor.open(folder / "oracle"), np.load(folder / f"dense-{step}.npz")
    g, h = reference["g"], reference["h"]

    def at(ref: str, module: str = "") -> float:
        steps, values = run.series(ref, module)
        return float(values[steps == step][0])

    eigenvalues = np.linalg.eigvalsh(h)[::-1]
    assert at("sharpness.value") == pytest.approx(eigenvalues[0], rel=1e-3)
    assert at("sharpness.examples") == 16
    assert at("batch_sharpness.gradient_norm") == pytest.approx(np.linalg.norm(g), rel=1e-5)
    assert at("batch_sharpness.value") == pytest.approx(g @ h @ g / (g @ g), rel=1e-4)
    if step != 3:
        for i in range(3):
            assert at("hessian_eigenvalue.value", f"eigenvalue[{i + 1}]") == pytest.approx(eigenvalues[i], rel=1e-3)


def test_other_probes(folder: Path) -> None:
    """Oracle: definition. Forwards and gradients of one process, also through the wrapper."""
    run = monitor.open(folder / "others")
    assert len(run.series("trajectory_kl.kl")[0]) == 3
    assert run.series("jacobian_spectrum.rows")[1].tolist() == [8, 8, 8]
    assert len(run.series("memorisation.fraction")[0]) >= 2
    # one batch twice: as it is and through the wrapper
    np.testing.assert_allclose(run.series("gradient_alignment.cosine", "a|b")[1], 1, rtol=1e-6)
    assert not run.warnings


def test_how_many_processes_train_is_a_fact(folder: Path) -> None:
    """Oracle: definition. Rules about the batch of all the data read it."""
    assert monitor.open(folder / "plain").facts["processes"] == 2


def test_one_process_of_one(tmp_path: Path) -> None:
    """Oracle: invariance. A launcher with one process: as without one."""
    lines = together("tests.probes.together", tmp_path, ["plain"], count=1)
    assert lines == ["rank 0 silent but for []", "rank 0 plain same"]
    run = monitor.open(tmp_path / "plain")
    assert run.series("sharpness.value")[0].tolist() == [0, 3, 6]
    assert not why(run)


def test_it_ends_where_others_would_give_up() -> None:
    """Oracle: definition. A measurement that is too late is ended at its next operation."""
    with pytest.raises(processes.Alone, match="that the other processes are made to wait"), processes.Listener(0.0):
        torch.ones(2).exp()


class Twice(nn.Module):
    """Uses one parameter twice, and one not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(torch.tanh(self.used(x)))


def test_local_gradients_are_those_of_backward() -> None:
    """Oracle: definition. Summed over two backward passes they are what accumulates, and no hook stays behind."""
    torch.manual_seed(0)
    model, epoch = Twice(), 0
    local = processes.LocalGradients([model], lambda: epoch, lambda _: None)
    for _ in range(2):
        F.mse_loss(model(torch.randn(3, 4)), torch.zeros(3, 4)).backward()
    sums = local.take(epoch)
    assert set(sums) == {id(p) for p in model.used.parameters()}
    for p in model.used.parameters():
        torch.testing.assert_close(sums[id(p)], p.grad, rtol=0, atol=0)
        assert sums[id(p)] is not p.grad
    before = {k: v.clone() for k, v in sums.items()}
    model(torch.randn(3, 4)).sum().backward()
    assert all(torch.equal(sums[k], v) for k, v in before.items())
    assert all(p._backward_hooks is None for p in model.parameters())


def test_local_gradients_of_an_attempt_that_was_given_up() -> None:
    """Oracle: definition. With a loss scale that was too large the update is tried again: the first try counts not."""
    model, epochs = nn.Linear(2, 1), [0]
    local = processes.LocalGradients([model], lambda: epochs[-1], lambda _: None)
    for epoch in (0, 1):
        epochs.append(epoch)
        model.zero_grad()
        model(torch.full((1, 2), 1.0 + epoch)).sum().backward()
    assert local.take(1)[id(model.weight)].tolist() == [[2, 2]]
    assert processes.LocalGradients([model], lambda: 0, lambda _: None).take(5) == {}
