"""The open row: statistics of micro-batches joined, and what of a step's inputs does not get into it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import monitor
from monitor.record import rows


@pytest.mark.parametrize("device", ["cpu", "elsewhere"])
def test_micro_batches_are_joined(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: naive transcription of the five ways, one statistic after another. NaN stays NaN, infinity infinite."""
    ways = ("mean", "sum", "max", "min", "last", "max", "min", "sum")
    if device == "elsewhere":
        monkeypatch.setattr(rows, "_which", lambda merge, _: torch.tensor([[rows._WAYS.index(way) for way in merge]]))
    batches = [[1.0, 2, 3, 4, 5, -6, 7, np.inf], [4.0, -2, 5, -4, 9, -5, 8, 1], [1.0, 6, np.nan, 3, 2, -9, 7.5, 2]]
    joined = torch.tensor(batches[0])
    for count, batch in enumerate(batches[1:], 1):
        joined = torch.as_tensor(rows._merged(ways, joined, batch, count))
    columns = list(zip(*batches, strict=True))
    naive = {"mean": np.mean, "sum": np.sum, "max": np.max, "min": np.min, "last": lambda c: c[-1]}
    np.testing.assert_allclose(joined, [naive[way](c) for way, c in zip(ways, columns, strict=True)], rtol=1e-6)


def test_more_inputs_than_are_followed_are_said(tmp_path: Path) -> None:
    """Oracle: planted fault. Of eleven tensors in one call eight are recorded, and the run says so."""

    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def forward(self, *x: Tensor) -> Tensor:
            return self.layer(torch.stack(x).sum(0))

    model = Many()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with monitor.attach(model, tmp_path / "run"):
        for _ in range(3):
            optimizer.zero_grad()
            model(*torch.randn(11, 4, 2)).square().mean().backward()
            optimizer.step()
    run = monitor.open(tmp_path / "run")
    assert sorted(run.modules("input_rms.rms")) == [f"input[{i}]" for i in range(8)]
    assert [(a["what"], "3 others" in a["why"]) for a in run.info["absent"] if a["what"] == "input_rms"] == [
        ("input_rms", True)
    ]
