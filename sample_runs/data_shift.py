"""Data shift: what the curvature of the loss on shifted data says of the accuracy there.

    python sample_runs/data_shift.py [FOLDER]
    monitor compare sample_runs/data_shift --show spectral_density.negative_ratio

A small tanh network learns 1,200 digits, five times the same; what differs is the noise on the other digits, on which
accuracy and curvature are measured. The more noise, the lower the accuracy and the heavier the negative side of the
spectrum: the network is at no minimum of the loss of data that it does not know.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import monitor

NOISES = (0.0, 0.15, 0.3, 0.45, 0.6)


def main(folder: str | None = None, steps: int = 201, seed: int = 0) -> None:
    torch.set_num_threads(1)
    images, labels = load_digits(return_X_y=True)
    rows = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(images / 16, dtype=torch.float32)[rows], torch.tensor(labels)[rows]
    for noise in NOISES:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        shifted = x[1200:] + noise * torch.randn(x[1200:].shape, generator=torch.Generator().manual_seed(seed))
        where = None if folder is None else Path(folder) / f"noise_{noise:.2f}"
        curvature = monitor.Curvature(every=200, full=1, loss_closure=(F.cross_entropy, (shifted, y[1200:])))
        with monitor.attach(model, where, curvature=curvature, every=10) as run:
            for step in range(steps):
                if step % 200 == 0:
                    with torch.no_grad():
                        run.log(test_acc=(model(shifted).argmax(dim=1) == y[1200:]).float().mean())
                i = torch.randint(0, 1200, (64,))
                optimizer.zero_grad()
                F.cross_entropy(model(x[i]), y[i]).backward()
                optimizer.step()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
