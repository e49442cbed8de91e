"""Digits in batches of 64: the weights move away from where they began like the logarithm of the steps.

    python sample_runs/distance_from_start.py [RUN_DIR]

A small tanh network, SGD with momentum at a constant learning rate, 2,000 steps. Of the distance from the start, all
parameters together, log t explains 98 %, √t 82 % and t 67 %: an ultra-slow diffusion, and nothing is wrong with it.
What the model says of its first batch settles sooner: `trajectory_kl` falls from 0.2 to 2e-4 nats in a hundred steps.
"""

from __future__ import annotations

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

import monitor
from monitor.probes import JacobianSpectrum, TrajectoryKL


def main(run_dir: str | None = None, steps: int = 2000, batch: int = 64, seed: int = 0) -> None:
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    images, labels = load_digits(return_X_y=True)
    rows = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:1500]
    x, y = torch.tensor(images / 16, dtype=torch.float32)[rows], torch.tensor(labels)[rows]

    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    run = monitor.attach(model, run_dir, probes=[TrajectoryKL(every=100), JacobianSpectrum(every=100)])

    for _ in range(steps):
        i = torch.randint(0, len(x), (batch,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[i]), y[i]).backward()
        optimizer.step()
    run.close()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
