"""Parameters that are in two optimizers, and what only looks like it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW, Optimizer

import monitor

STEPS = 45
#: A training of ``(body, head)``, so many steps long.
Training = Callable[[nn.Module, nn.Module], None]


def loss(body: nn.Module, head: nn.Module) -> Tensor:
    x = torch.randn(16, 6)
    return F.cross_entropy(head(body(x)), x[:, :3].argmax(1))


def together(optimizers: Sequence[Optimizer], body: nn.Module, head: nn.Module) -> None:
    """One backward, and an update of each."""
    for _ in range(STEPS):
        for o in optimizers:
            o.zero_grad()
        loss(body, head).backward()
        for o in optimizers:
            o.step()


def head_in_both(body: nn.Module, head: nn.Module) -> None:
    together([Adam([*body.parameters(), *head.parameters()], lr=1e-3), SGD(head.parameters(), lr=0.01)], body, head)


def parted(body: nn.Module, head: nn.Module) -> None:
    """Each has its own."""
    together([Adam(body.parameters(), lr=1e-3), SGD(head.parameters(), lr=0.01)], body, head)


def in_turn(body: nn.Module, head: nn.Module) -> None:
    """Two losses train one body, each with a backward of its own."""
    optimizers = [AdamW([*body.parameters(), *head.parameters()], lr=lr) for lr in (1e-3, 1e-4)]
    for _ in range(STEPS):
        for o in optimizers:
            o.zero_grad()
            loss(body, head).backward()
            o.step()


def by_turns(body: nn.Module, head: nn.Module) -> None:
    """One for even steps, another for odd ones."""
    optimizers = [AdamW([*body.parameters(), *head.parameters()], lr=lr) for lr in (1e-3, 1e-4)]
    for step in range(2 * STEPS):
        optimizers[step % 2].zero_grad()
        loss(body, head).backward()
        optimizers[step % 2].step()


def replaced(body: nn.Module, head: nn.Module) -> None:
    """The second takes the place of the first, which is kept."""
    optimizers = [AdamW([*body.parameters(), *head.parameters()], lr=lr) for lr in (1e-3, 1e-4)]
    for step in range(2 * STEPS):
        o = optimizers[step >= STEPS]
        o.zero_grad()
        loss(body, head).backward()
        o.step()


class Wrapper(Optimizer):
    """Works through another one, and pulls the parameters towards where they were before every fifth update."""

    def __init__(self, inner: Optimizer) -> None:
        params = [p for group in inner.param_groups for p in group["params"]]
        super().__init__(params, {})
        self.inner, self.done = inner, 0

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        params = [p for group in self.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in params]
        self.inner.step()
        self.done += 1
        if self.done % 5 == 0:
            with torch.no_grad():
                for p, old in zip(params, before, strict=True):
                    p.lerp_(old, 0.5)


def wrapped(body: nn.Module, head: nn.Module) -> None:
    """An optimizer around another one."""
    together([Wrapper(Adam([*body.parameters(), *head.parameters()], lr=1e-3))], body, head)


def recorded(training: Training, folder: Path) -> monitor.Run:
    torch.manual_seed(0)
    body, head = nn.Sequential(nn.Linear(6, 8), nn.Tanh()), nn.Linear(8, 3)
    with monitor.attach(nn.Sequential(body, head), folder):
        training(body, head)
    return monitor.open(folder)


def found(run: monitor.Run) -> list[str]:
    return [f.rule for f in run.findings() if f.severity != "info"]


def test_head_in_both(tmp_path: Path) -> None:
    """Oracle: planted fault. The head's weight and bias are given to both; only the second is told of it."""
    run = recorded(head_in_both, tmp_path / "run")
    assert found(run) == ["parameters_in_two_optimizers"]
    steps, shared = run.series("optimizer_overlap.shared", "optimizer[1]")
    assert set(shared) == {2}
    assert steps.tolist() == [*range(1, 10), 29]  # in the first step the second one is not known yet


@pytest.mark.parametrize("training", [parted, in_turn, by_turns, replaced, wrapped])
def test_not_in_both(training: Training, tmp_path: Path) -> None:
    """Oracle: planted fault, absent. No gradient is used by two optimizers."""
    run = recorded(training, tmp_path / "run")
    assert found(run) == []
    if "optimizer_overlap.twice" in run.refs():
        assert not any(run.series("optimizer_overlap.twice", "optimizer[1]")[1])
