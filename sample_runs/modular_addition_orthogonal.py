"""Modular addition with the orthogonal gradient: the network generalises at once, and nothing collapses.

    python sample_runs/modular_addition_orthogonal.py [RUN_DIR]

The network and the optimizer of modular_addition_collapse.py on a + b mod 113, with one line added: the gradient's
component along each weight matrix is removed. Without it 300 steps give a validation accuracy below 1 %; with it the
accuracy is above 99 % by step 132.
"""

from __future__ import annotations

import sys

import torch
from torch import nn

import monitor
from monitor.remedies import OrthogonalGradient

P = 113


def main(run_dir: str | None = None, steps: int = 300) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    a, b = (grid.flatten() for grid in torch.meshgrid(torch.arange(P), torch.arange(P), indexing="ij"))
    pairs = torch.cat([nn.functional.one_hot(a, P), nn.functional.one_hot(b, P)], dim=1).float()
    sums = (a + b) % P
    shuffled = torch.randperm(P * P, generator=torch.Generator().manual_seed(0))
    train, validation = shuffled[: int(0.4 * P * P)], shuffled[int(0.4 * P * P) :]
    x, y = pairs[train], sums[train]

    model = nn.Sequential(
        nn.Linear(2 * P, 200, bias=False),
        nn.ReLU(),
        nn.Linear(200, 200, bias=False),
        nn.ReLU(),
        nn.Linear(200, P, bias=False),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.99), eps=1e-25, weight_decay=0)
    OrthogonalGradient(optimizer)
    recording = monitor.attach(model, run_dir)

    for step in range(steps):
        if step % 12 == 0:
            with torch.no_grad():
                correct = model(pairs[validation]).argmax(dim=1) == sums[validation]
            recording.log(val_acc=correct.float().mean().item())
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
