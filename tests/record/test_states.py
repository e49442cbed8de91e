"""What the optimizer remembers: rows of embeddings that nothing was learnt for, and what Adam divides by."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import monitor
from monitor.record.passes.adam_state import moment_rms
from monitor.record.passes.embedding import COLUMNS, row_stats, touched

STEPS = 101


class Bag(nn.Module):
    """The mean of embedded tokens, classified."""

    def __init__(self, rows: int = 50, tied: bool = False) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(rows, 8, padding_idx=0), nn.Linear(8, rows if tied else 5)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.tokens(ids).mean(1))


def train(
    folder: Path, make: Callable[[Any], torch.optim.Optimizer], ids: Callable[[int], Tensor], model: Bag | None = None
) -> tuple[monitor.Run, Bag, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = model or Bag()
    opt = make(model.parameters())
    with monitor.attach(model, folder):
        for step in range(STEPS):
            opt.zero_grad()
            F.cross_entropy(model(ids(step)), torch.randint(0, 5, (4,))).backward()
            opt.step()
    run = monitor.open(folder)
    assert not run.warnings
    return run, model, opt


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rows_without_a_gradient(name: str, tmp_path: Path) -> None:
    """Oracle: closed form. Tokens 1 to 9 at first, 10 to 18 from step 50 on, of 50: 41, then 32 rows are left."""
    run, _, _ = train(
        tmp_path / "run", OPTIMIZERS[name], lambda step: torch.randint(1, 10, (4, 64)) + (9 if step >= 50 else 0)
    )
    steps, never = run.series("embedding_rows.never", "tokens.weight")
    assert steps.tolist() == [0, 10, 100]
    assert never.tolist() == [41, 41, 32]
    assert run.series("embedding_rows.frac", "tokens.weight")[1][-1] == pytest.approx(0.64)


def test_a_tied_embedding_has_gradients_from_the_output(tmp_path: Path) -> None:
    """Oracle: closed form. The softmax reaches every row, the padding row too."""
    ids = torch.ones(4, 3, dtype=torch.long)
    run, _, _ = train(tmp_path / "run", OPTIMIZERS["adamw"], lambda _: ids, Bag(tied=True))
    assert run.series("embedding_rows.never", "tokens.weight")[1].tolist() == [0, 0, 0]


def test_without_a_memory_nothing_is_said(tmp_path: Path) -> None:
    """Oracle: planted fault. Plain SGD remembers no gradient: absent, with the reason; a model without rows: silent."""
    run, _, _ = train(
        tmp_path / "run", lambda p: torch.optim.SGD(p, lr=0.1), lambda _: torch.ones(4, 3, dtype=torch.long)
    )
    assert not any(r.startswith(("embedding_rows", "eps_ratio")) for r in run.refs())
    assert "embedding_rows" in {a["what"] for a in run.info["absent"]}


def test_touched() -> None:
    """Oracle: naive transcription. A row counts if any of the columns looked at is not 0; NaN is not 0."""
    v = torch.zeros(6, 13)
    v[1], v[3] = 1e-45, math.nan
    assert touched(v).tolist() == [False, True, False, True, False, False]
    assert touched(v[:, :1]).sum() == 2 and touched(torch.ones(2, COLUMNS - 1)).all()
    assert row_stats(touched(v)) == [6, 4]


def test_what_adam_divides_by(tmp_path: Path) -> None:
    """Oracle: dense float64 reference from the optimizer's own state at the end, with its bias correction."""
    run, model, opt = train(tmp_path / "run", OPTIMIZERS["adamw"], lambda _: torch.randint(1, 50, (4, 8)))
    assert run.series("eps_ratio.ratio", "head.weight")[0].tolist() == [0, 10, 100]
    for name, p in model.named_parameters():
        v = opt.state[p]["exp_avg_sq"].double() / (1 - 0.95**STEPS)
        rms = v.mean().sqrt().item()
        assert run.series("eps_ratio.grad_rms", name)[1][-1] == pytest.approx(rms, rel=1e-6)
        assert run.series("eps_ratio.ratio", name)[1][-1] == pytest.approx(1e-8 / rms, rel=1e-6)


@pytest.mark.parametrize(("g", "update"), [(1.0, 0.5), (9.0, 0.9), (1 / 9, 0.1)])
def test_constant_gradient(g: float, update: float) -> None:
    """Oracle: closed form, by torch's own Adam: gradients of g ε give updates of g / (1 + g) = 1 / (1 + ε / rms)."""
    eps = 1e-3
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    opt = torch.optim.Adam([w], lr=1.0, eps=eps)
    before = w.detach().clone()
    for _ in range(7):
        before = w.detach().clone()
        w.grad = torch.full((3,), g * eps, dtype=torch.float64)
        opt.step()
    rms = moment_rms([opt.state[w]["exp_avg_sq"]], 1 - 0.999**7)
    assert (before - w.detach()).tolist() == pytest.approx([update] * 3, rel=1e-6)
    assert 1 / (1 + eps / float(rms[0])) == pytest.approx(update, rel=1e-6)


def test_moments_in_16_bits() -> None:
    """Oracle: dense float64 reference. 10,000 elements summed in float32, not in bfloat16."""
    v = torch.rand(10_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = moment_rms([v, v[:3]], 0.5)
    assert isinstance(found, np.ndarray)
    expected = [math.sqrt(2 * x.double().mean().item()) for x in (v, v[:3])]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
