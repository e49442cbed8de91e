"""16-bit parameters that an optimizer trains through float32 copies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import monitor


@pytest.mark.parametrize("kind", ["in order", "decay apart", "reversed", "among others"])
def test_copies_that_are_equal(kind: str, tmp_path: Path) -> None:
    """Oracle: definition. Biases that all begin at zero are told apart by an order that is known, or not at all."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)).half()
    for p in model.parameters():
        if p.dim() == 1:
            nn.init.zeros_(p)
    masters = {name: p.detach().float().requires_grad_() for name, p in model.named_parameters()}
    groups = [list(masters.values())]
    if kind == "reversed":
        groups[0].reverse()
    elif kind == "decay apart":
        groups = [[m for m in groups[0] if m.dim() == n] for n in (2, 1)]
    elif kind == "among others":
        groups[0].insert(0, torch.zeros(4, requires_grad=True))
    opt = torch.optim.SGD([{"params": g} for g in groups], lr=0.0)
    with monitor.attach(model, tmp_path / "run", opt):
        for i, m in enumerate(masters.values()):
            m.grad = torch.full_like(m, float(i + 1))
        for group in groups:
            for m in group:
                m.grad = torch.zeros_like(m) if m.grad is None else m.grad
        opt.step()
    run = monitor.open(tmp_path / "run")
    named = [name for name in run.modules("grad_norm.max_abs") if name in masters]
    order = list(masters)
    assert [run.series("grad_norm.max_abs", name)[1][0] - 1 for name in named] == [order.index(name) for name in named]
    certain = kind in ("in order", "decay apart")
    assert set(named) == {name for name, m in masters.items() if certain or m.dim() == 2}


@pytest.mark.parametrize("found", ["attach", "optimizer"])
def test_parameters_that_are_trained_through_a_copy(found: str, tmp_path: Path) -> None:
    """Oracle: invariance. bfloat16 parameters with float32 masters: these go by the names of the model's."""

    def train(record: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3)).bfloat16()
        masters = [p.detach().clone().float().requires_grad_() for p in model.parameters()]
        opt = torch.optim.AdamW(masters, lr=0.01)
        given = opt if found == "optimizer" else None
        handle = monitor.attach(model, tmp_path / "run", optimizer=given) if record else None
        for _ in range(25):
            F.cross_entropy(model(torch.randn(4, 6).bfloat16()), torch.arange(4) % 3).backward()
            for p, master in zip(model.parameters(), masters, strict=True):
                assert p.grad is not None
                master.grad, p.grad = p.grad.float(), None
            nn.utils.clip_grad_norm_(masters, 0.1)
            opt.step()
            with torch.no_grad():
                for p, master in zip(model.parameters(), masters, strict=True):
                    p.copy_(master)
        if handle is not None:
            handle.close()
        return masters

    assert all(torch.equal(a, b) for a, b in zip(train(False), train(True), strict=True))
    run = monitor.open(tmp_path / "run")
    assert run.modules("grad_norm.norm") == tuple(f"{i}.{name}" for i in (0, 2, 3) for name in ("weight", "bias"))
    assert len(run.series("clip.coefficient")[0]) == run.steps - 1 == 24  # it is not known before the first update
    assert not [f for f in run.findings() if f.rule == "unoptimized_parameter"]
    assert not run.warnings
