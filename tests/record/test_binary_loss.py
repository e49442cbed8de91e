"""Logits of binary cross-entropies: their statistics, and whether they are probabilities already."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import monitor
from monitor.record.passes import binary_logits
from monitor.record.passes.binary_logits import squashed

SAID: dict[str, tuple[Callable[[Tensor], Tensor], bool | None]] = {
    "sigmoid": (torch.sigmoid, True),
    "sigmoid, rearranged": (lambda z: z.sigmoid().half().float()[:, 0].unsqueeze(1).expand(-1, 2).T.flatten(), True),
    "softmax": (lambda z: z.softmax(1)[:, :1].squeeze(1), True),
    "logits": (lambda z: z, False),
    "a linear layer, rearranged": (lambda z: F.linear(z, torch.ones(1, 4)).view(-1), False),
    "a gate": (lambda z: z.sigmoid() * 8 - 4, False),
    "between 0 and 1 by other means": (lambda z: z.clamp(0, 1), False),
    "a function of the user's own": (lambda z: Own.apply(z), None),
}


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, z: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return z.sigmoid()

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return g


@pytest.mark.parametrize(("made", "said"), SAID.values(), ids=list(SAID))
def test_what_autograd_says(made: Callable[[Tensor], Tensor], said: bool | None) -> None:
    """Oracle: definition. Only what a sigmoid or a softmax gave, moved at most, counts; what cannot be seen is None."""
    assert squashed(made(torch.randn(6, 4, requires_grad=True)).grad_fn) is said


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_statistics(dtype: torch.dtype) -> None:
    """Oracle: dense float64 reference. Small tensors are read whole, however they lie."""
    z = torch.randn(30, 20, dtype=dtype).T
    known = z.double()
    wanted = [600, float(known.sum()), float(known.min()), float(known.max()), 1]
    np.testing.assert_allclose(binary_logits.binary_logits(z, True), wanted, rtol=1e-5, atol=1e-4)


def test_large_logits_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: closed form. Evenly spaced elements; of what is large and not in one piece, those of the first rows."""
    monkeypatch.setattr(binary_logits, "READ", 10)
    monkeypatch.setattr(binary_logits, "COPIED", 20)
    z = torch.arange(100.0)
    assert binary_logits.binary_logits(z, False) == [10, 450, 0, 90, 0]
    # of 10 rows the first two, (0, 10, …, 90) and (1, 11, …, 91): every second element of them
    assert binary_logits.binary_logits(z.view(10, 10).T, False) == [10, 405, 0, 81, 0]


class Model(nn.Module):
    """A classifier of two classes; ``last`` is what ends it."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1), last, nn.Flatten(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def train(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], folder: Path) -> monitor.Run:
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with monitor.attach(model, folder):
        for _ in range(45):
            x = torch.randn(32, 8)
            optimizer.zero_grad()
            for part in x.split(16):
                (loss(model(part), (part.sum(1) > 0).float()) / 2).backward()
            optimizer.step()
    return monitor.open(folder)


def found(run: monitor.Run) -> list[tuple[str, str, int]]:
    return [(f.rule, f.module, f.first_step) for f in run.findings() if f.severity != "info"]


def test_sigmoid_twice(tmp_path: Path) -> None:
    """Oracle: planted fault. A sigmoid at the model's end, in front of the loss that applies its own."""
    run = train(Model(nn.Sigmoid()), nn.BCEWithLogitsLoss(), tmp_path / "run")
    assert found(run) == [("double_sigmoid", "binary_cross_entropy", 0)]
    steps, low = run.series("binary_logits.min", "binary_cross_entropy")
    assert steps.tolist() == [*range(10), 20, 40] and (low > 0).all()
    assert set(run.series("binary_logits.elements", "binary_cross_entropy")[1]) == {32}


@pytest.mark.parametrize(
    ("last", "loss", "said"),
    [
        (nn.Identity(), F.binary_cross_entropy_with_logits, {0.0}),
        (nn.Sigmoid(), F.binary_cross_entropy, set()),
    ],
    ids=["logits", "the loss that takes probabilities"],
)
def test_sigmoid_once(
    last: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], said: set[float], tmp_path: Path
) -> None:
    """Oracle: planted fault, absent. The same model with one sigmoid, in the loss or in front of it."""
    run = train(Model(last), loss, tmp_path / "run")
    assert found(run) == []
    names = run.modules("binary_logits.squashed")
    assert {v for m in names for v in run.series("binary_logits.squashed", m)[1].tolist()} == said
