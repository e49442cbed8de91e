"""Optimizers that are made anew, and those that are not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import monitor

#: The optimizer of an iteration, given the model, the one before and the number of the iteration.
Made = Callable[[nn.Module, torch.optim.Optimizer | None, int], torch.optim.Optimizer]


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-3)


def recorded(made: Made, folder: Path) -> monitor.Run:
    torch.manual_seed(0)
    model = nn.Linear(8, 3)
    optimizer = None
    with monitor.attach(model, folder):
        for i in range(150):
            optimizer = made(model, optimizer, i)
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(16, 8)), torch.randint(0, 3, (16,))).backward()
            optimizer.step()
    return monitor.open(folder)


def found(run: monitor.Run) -> list[tuple[str, int]]:
    return [(f.rule, f.first_step) for f in run.findings() if f.severity != "info"]


def test_made_for_every_update(tmp_path: Path) -> None:
    """Oracle: planted fault. An Adam that is constructed inside the loop."""
    run = recorded(lambda model, _, i: adam(model), tmp_path / "run")
    assert run.steps == 150
    assert found(run) == [("optimizer_made_anew", 0)]
    assert set(run.series("optimizer_age.updates")[1]) == {1}


def test_made_once(tmp_path: Path) -> None:
    """Oracle: closed form. One Adam: its age is the number of the step, counted from 1."""
    run = recorded(lambda model, old, i: old or adam(model), tmp_path / "run")
    steps, updates = run.series("optimizer_age.updates")
    assert steps.tolist() == [*range(10), *range(11, 150, 11)]
    assert (updates == steps + 1).all()
    assert found(run) == []


@pytest.mark.parametrize(
    "made",
    [
        lambda model, _, i: torch.optim.SGD(model.parameters(), lr=0.1),
        lambda model, old, i: old if old is not None and i % 5 else adam(model),
        lambda model, old, i: old if old is not None and i % 11 else adam(model),
    ],
    ids=["nothing to remember", "for every five updates", "for as many as lie between two records"],
)
def test_made_anew_rightly(made: Made, tmp_path: Path) -> None:
    """Oracle: planted fault, absent. Plain SGD forgets nothing; every five or eleven updates may be meant."""
    assert found(recorded(made, tmp_path / "run")) == []
