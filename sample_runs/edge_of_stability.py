"""Full-batch gradient descent on digits: the sharpness climbs until the learning rate is as large as it allows.

    python sample_runs/edge_of_stability.py [RUN_DIR]

256 digits, a small tanh network, squared loss, learning rate 0.1. The largest eigenvalue of the Hessian grows from 8 to
2 / 0.1 = 20, the most that gradient descent is stable for, within some 800 steps, overshoots it a little, and stays at
it while the loss goes on falling: the edge of stability. It looks alarming, and is how such trainings go.
"""

from __future__ import annotations

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

import monitor


def main(run_dir: str | None = None, steps: int = 2000) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images[:256] / 16, dtype=torch.float32), torch.tensor(labels[:256])
    target = nn.functional.one_hot(y, 10).float()

    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor.attach(model, run_dir, curvature=monitor.Curvature(every=40))

    for _ in range(steps):
        optimizer.zero_grad()
        loss = 0.5 * (model(x) - target).square().sum(dim=1).mean()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
