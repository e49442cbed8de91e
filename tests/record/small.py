"""A small model, its training, and a recording of it in which nothing went wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import monitor


def mlp(features: int = 12, classes: int = 5) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, 16), nn.ReLU(), nn.Linear(16, classes))


def train(
    model: nn.Module,
    steps: int = 25,
    inputs: Callable[[], Tensor] = lambda: torch.randn(8, 12),
    loss: Callable[[Tensor], Tensor] = lambda z: F.cross_entropy(z, torch.randint(0, 5, (8,))),
    optimizer: torch.optim.Optimizer | None = None,
) -> torch.optim.Optimizer:
    optimizer = optimizer or torch.optim.AdamW(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model(inputs())).backward()
        optimizer.step()
    return optimizer


def clean(run_dir: Path, steps: int) -> monitor.Run:
    """The run, in which nothing went wrong."""
    run = monitor.open(run_dir)
    assert run.steps == steps
    assert not run.warnings
    return run


def absent(run: monitor.Run) -> dict[str, str]:
    return {a["what"]: a["why"] for a in json.loads((run.path / "run.json").read_text())["absent"]}
