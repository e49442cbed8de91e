"""What is recorded of the loop around a model: the mode it is in, and how the labels of its batches are mixed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import monitor
from monitor.record.sites._modes import averages, drops
from monitor.record.sites.labels import MEMORY

LOOKS = [*range(10), 20, 40]
STEPS = LOOKS[-1] + 1


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.LSTM(8, 4, 2, dropout=0.1), _First())


class _First(nn.Module):
    def forward(self, x: tuple[Tensor, object]) -> Tensor:
        return x[0]


def run(model: nn.Module, before: Callable[[int], object], labels: Callable[[int], list[Tensor]], folder: Path):
    """Train on batches of these labels, and the run."""
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with monitor.attach(model, folder):
        for step in range(STEPS):
            before(step)
            optimizer.zero_grad()
            for y in labels(step):
                F.cross_entropy(model(torch.randn(len(y), 6)), y, ignore_index=3).backward()
            optimizer.step()
    run = monitor.open(folder)
    assert not run.warnings
    return run


def four(step: int) -> list[Tensor]:
    return [torch.tensor([0, 1, 2, 0])]


def test_modules_that_depend_on_the_mode() -> None:
    """Oracle: definition. Dropout of nothing, layer normalisation and statistics of the batch alone do not."""
    depend = [nn.Dropout(0.1), nn.RReLU(), nn.GRU(2, 2, 2, dropout=0.1), nn.MultiheadAttention(4, 2, dropout=0.1)]
    others = [nn.Dropout(0.0), nn.LayerNorm(2), nn.LSTM(2, 2), nn.MultiheadAttention(4, 2), nn.Linear(2, 2)]
    assert all(drops(m) and not averages(m) for m in depend)
    assert not any(drops(m) or averages(m) for m in others)
    assert averages(nn.BatchNorm2d(2)) and averages(nn.SyncBatchNorm(2))
    assert not averages(nn.BatchNorm2d(2, track_running_stats=False)) and not averages(nn.InstanceNorm2d(2))


@pytest.mark.parametrize("wrapped", [False, True])
def test_modules_in_evaluation(wrapped: bool, tmp_path: Path) -> None:
    """Oracle: closed form. One of three is frozen from step 5 on, and all are in evaluation from step 15 on."""
    model = network()
    called = torch.nn.DataParallel(model) if wrapped else model

    def before(step: int) -> None:
        model.train(step < 15)
        model[1].train(step < 5)

    found = run(called, before, four, tmp_path / "run")
    columns = {c: found.series(f"training_mode.{c}", "") for c in ("share", "left", "modules")}
    assert all(steps.tolist() == LOOKS for steps, _ in columns.values())
    share, left, modules = (values.tolist() for _, values in columns.values())
    assert share == pytest.approx([0.0] * 5 + [1 / 3] * 5 + [1.0] * 2)
    assert (left, modules) == ([0.0] * 10 + [3.0] * 2, [3.0] * 12)


def test_nothing_to_be_in_a_mode(tmp_path: Path) -> None:
    """Oracle: definition. Of a model without such modules nothing is recorded, and nothing is judged."""
    found = run(nn.Linear(6, 4), lambda step: None, four, tmp_path / "run")
    assert "training_mode" not in found.metrics()
    assert "trained_in_eval_mode" in found.verdict().unjudged


def test_pairs_of_labels(tmp_path: Path) -> None:
    """Oracle: naive transcription. Over all pairs of a step's labels, of two micro-batches, without ignored ones."""
    generator = torch.Generator().manual_seed(1)
    batches = [[torch.randint(0, 4, (n,), generator=generator) for n in (5, 7)] for _ in range(STEPS)]
    batches[4] = [torch.tensor([2]), torch.tensor([3])]  # a single one to be counted
    found = run(nn.Linear(6, 4), lambda step: None, lambda step: batches[step], tmp_path / "run")
    steps, within = found.series("label_mixing.within", "cross_entropy")
    looks = [s for s in LOOKS if s != 4]
    assert steps.tolist() == looks
    kept = [[int(y) for y in torch.cat(batches[s]) if y != 3] for s in looks]
    same = np.array([np.mean([a == b for a, b in combinations(y, 2)]) for y in kept])
    np.testing.assert_allclose(within, same, rtol=1e-6)
    weight = (1 - 1 / MEMORY) ** np.arange(len(looks))[::-1]
    shares = np.average([[y.count(c) / len(y) for c in range(4)] for y in kept], axis=0, weights=weight)
    mean, pooled = np.average(same, weights=weight), (shares**2).sum()
    assert found.series("label_mixing.mean_within", "cross_entropy")[1][-1] == pytest.approx(mean, rel=1e-6)
    assert found.series("label_mixing.pooled", "cross_entropy")[1][-1] == pytest.approx(pooled, rel=1e-6)
    excess = found.series("label_mixing.excess", "cross_entropy")[1][-1]
    assert excess == pytest.approx((mean - pooled) / (1 - pooled), rel=1e-5)


@pytest.mark.parametrize("recorded", [False, True])
def test_evaluations_in_training_mode(recorded: bool, tmp_path: Path) -> None:
    """Oracle: invariance. Losses, averages and random numbers are those of a run that nobody watches; all are counted.

    Of the four losses of an evaluation, one is of a batch that was just trained on.
    """

    def trained(handle: bool) -> tuple[list[float], list[Tensor], Tensor]:
        torch.manual_seed(0)
        model, losses = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)), []
        data, held = torch.randn(30, 8, 6), torch.randn(3, 8, 6)
        y = torch.arange(8) % 3
        optimizer = torch.optim.Adam(model.parameters())
        attached = monitor.attach(model, tmp_path / "run") if handle else None
        for step in range(30):
            optimizer.zero_grad()
            last = data[step]
            F.cross_entropy(model(last), y).backward()
            optimizer.step()
            if step % 10 == 9:
                with torch.no_grad():
                    losses += [float(F.cross_entropy(model(x), y)) for x in (last, *held)]
        if attached is not None:
            attached.close()
        return losses, list(model.state_dict().values()), torch.get_rng_state()

    expected, found = trained(False), trained(recorded)
    assert expected[0] == found[0]
    assert all(torch.equal(a, b) for a, b in zip(expected[1], found[1], strict=True))
    assert torch.equal(expected[2], found[2])
    if recorded:
        run = monitor.open(tmp_path / "run")
        assert [x.tolist() for x in run.series("evaluation_mode.losses", "")] == [[10, 20, 30], [3, 3, 3]]
        assert (
            set(run.series("evaluation_mode.norms", "")[1]) == set(run.series("evaluation_mode.dropouts", "")[1]) == {1}
        )
