"""Full-batch gradient descent on digits: the sharpness climbs until the learning rate is as large as it allows.

    python sample_runs/edge_of_stability.py [RUN_DIR]

256 digits, a small tanh network, squared loss, learning rate 0.1. The largest eigenvalue of the Hessian grows from 8 to
2 / 0.1 = 20, the most that gradient descent is stable for, within some 1,200 steps, overshoots it a little, and stays
at it while the loss goes on falling: the edge of stability. It looks alarming, and is how such trainings go.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import partial

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim import SGD, Optimizer

import monitor

DESCENT = partial(SGD, lr=0.1)


def problem() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """The network, its inputs and what it shall answer."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    rows = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:256]
    x, y = torch.tensor(images / 16, dtype=torch.float32)[rows], torch.tensor(labels)[rows]
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))
    return model, x, nn.functional.one_hot(y, 10).float()


def squared_error(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Half the squared distance, mean over examples."""
    return 0.5 * (out - target).square().sum(dim=1).mean()


def main(
    run_dir: str | None = None,
    steps: int = 2000,
    optimizer_of: Callable[[Iterable[nn.Parameter]], Optimizer] = DESCENT,
    every: int = 40,
) -> None:
    torch.set_num_threads(1)
    model, x, target = problem()
    optimizer = optimizer_of(model.parameters())
    run = monitor.attach(model, run_dir, curvature=monitor.Curvature(every=every))

    for _ in range(steps):
        optimizer.zero_grad()
        loss = squared_error(model(x), target)
        loss.backward()
        optimizer.step()
    run.close()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
