"""Batch normalisation: over how many examples, wherever they come from."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import monitor


def recorded(rows: int, parts: int, frozen: bool, folder: Path) -> monitor.Run:
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 2))
    model = nn.Sequential(features, nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with monitor.attach(model, folder):
        for _ in range(25):
            for m in model.modules():
                m.train(not (frozen and isinstance(m, nn.BatchNorm2d)))
            optimizer.zero_grad()
            for x in torch.randn(rows, 1, 8, 8).chunk(parts):
                F.cross_entropy(model(x), torch.randint(0, 3, (len(x),))).backward()
            optimizer.step()
    return monitor.open(folder)


def found(run: monitor.Run) -> list[tuple[str, int]]:
    return [(f.rule, f.first_step) for f in run.findings() if f.rule == "batch_norm_few_examples"]


def test_micro_batches_are_normalised_by_themselves(tmp_path: Path) -> None:
    """Oracle: closed form. 10 rows in 4 parts are 3, 3, 3 and 1; of one the second layer sees 2 by 2 pixels."""
    run = recorded(10, 4, False, tmp_path / "run")
    columns = {c: run.series(f"batch_norm.{c}", "") for c in ("examples", "samples", "calls")}
    assert columns["examples"][0].tolist() == [*range(10), 20]
    assert {c: set(values.tolist()) for c, (_, values) in columns.items()} == {
        "examples": {1},
        "samples": {4},
        "calls": {8},
    }
    assert found(run) == [("batch_norm_few_examples", 0)]


def test_enough_examples(tmp_path: Path) -> None:
    """Oracle: planted fault, absent. Eight examples are enough."""
    run = recorded(8, 1, False, tmp_path / "run")
    assert set(run.series("batch_norm.examples", "")[1]) == {8}
    assert found(run) == []


def test_in_evaluation_it_is_none(tmp_path: Path) -> None:
    """Oracle: planted fault, absent. Two examples, but the statistics are not those of the batch."""
    run = recorded(2, 1, True, tmp_path / "run")
    assert run.modules("batch_norm.examples") == ()
    assert found(run) == []
