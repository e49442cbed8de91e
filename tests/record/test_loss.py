"""Which calls of backward the loss of a step is made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import monitor

#: One step: given the model and the optimizer, it gives the loss that is to be recorded and the calls it is made of.
Step = Callable[[nn.Module, torch.optim.Optimizer], tuple[float, int]]


def batch_loss(model: nn.Module, shift: float = 0.0) -> Tensor:
    x = torch.randn(8, 4)
    return F.mse_loss(model(x + shift), x[:, :2])


def perturbed(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[float, int]:
    """Sharpness-aware: the gradient at other parameters is what the update is made with."""
    batch_loss(model).backward()
    moved = [0.1 * p.grad for p in model.parameters() if p.grad is not None]
    with torch.no_grad():
        for p, by in zip(model.parameters(), moved, strict=True):
            p.add_(by)
    optimizer.zero_grad()
    loss = batch_loss(model)
    loss.backward()
    with torch.no_grad():
        for p, by in zip(model.parameters(), moved, strict=True):
            p.sub_(by)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item(), 1


def adversarial(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[float, int]:
    """Three backwards that look for a hard batch, then two that train on it."""
    for _ in range(3):
        batch_loss(model).backward()
    optimizer.zero_grad()
    losses = [batch_loss(model, 1.0) / 2 for _ in range(2)]
    for loss in losses:
        loss.backward()
    optimizer.step()
    return sum(loss.item() for loss in losses), 2


def put_together(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[float, int]:
    """The gradient of each task by itself, and an update with both."""
    losses, gradients = [batch_loss(model), batch_loss(model, 1.0)], []
    for loss in losses:
        optimizer.zero_grad()
        loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for p, *parts in zip(model.parameters(), *gradients, strict=True):
        p.grad = torch.stack(parts).sum(0)
    optimizer.step()
    return sum(loss.item() for loss in losses), 2


def accumulated(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[float, int]:
    """Two micro-batches."""
    optimizer.zero_grad()
    losses = [batch_loss(model) / 2 for _ in range(2)]
    for loss in losses:
        loss.backward()
    optimizer.step()
    return sum(loss.item() for loss in losses), 2


@pytest.mark.parametrize("step", [perturbed, adversarial, put_together, accumulated])
def test_calls_that_count(step: Step, tmp_path: Path) -> None:
    """Oracle: closed form. The sum of the losses whose gradients the update was made with, as the loop has it."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with monitor.attach(model, tmp_path / "run"):
        expected = [step(model, optimizer) for _ in range(15)]
    run = monitor.open(tmp_path / "run")
    losses, calls = zip(*expected, strict=True)
    assert run.series("loss.value")[1] == pytest.approx(losses, rel=1e-6)
    assert tuple(run.series("loss.micro_steps")[1]) == calls


def test_gradients_of_another_model_removed(tmp_path: Path) -> None:
    """Oracle: closed form. The critic's gradients are removed between two calls; the update is the generator's."""
    torch.manual_seed(0)
    critic, generator = nn.Linear(4, 1), nn.Linear(4, 4)
    both = nn.ModuleList([critic, generator])
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (generator, critic)]
    expected = []
    with monitor.attach(both, tmp_path / "run"):
        for _ in range(12):
            for o in optimizers:
                o.zero_grad()
            made = generator(torch.randn(8, 4))
            losses = [-critic(made).mean(), critic(made.detach()).mean() + 1]
            losses[0].backward()
            optimizers[1].zero_grad()
            losses[1].backward()
            for o in optimizers:
                o.step()
            expected.append(sum(loss.item() for loss in losses))
    run = monitor.open(tmp_path / "run")
    assert run.series("loss.value", "")[1] == pytest.approx(expected, rel=1e-5)


def test_gradients_of_two_dtypes_are_clipped_once(tmp_path: Path) -> None:
    """Oracle: definition. torch multiplies those of each dtype and device in a call of its own, by the same factor."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 2).double()])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    factors = []
    with monitor.attach(model, tmp_path / "run"):
        for _ in range(3):
            optimizer.zero_grad()
            model[1](model[0](torch.randn(8, 4) * 30).double()).square().mean().backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            factors.append(0.5 / (norm.item() + 1e-6))
            optimizer.step()
    assert max(factors) < 1
    assert monitor.open(tmp_path / "run").series("clip.coefficient")[1] == pytest.approx(factors)
