"""Modular addition without weight decay: every sample is fitted, the softmax collapses, then the loss explodes.

    python sample_runs/modular_addition_collapse.py [RUN_DIR]

A bias-free network learns a + b mod 59 from 40 % of the pairs, full batch, in float32. Nothing holds the logits back,
so from about step 1,450 on more and more samples have a loss of exactly 0; near step 1,900 the loss jumps from 1e-7 to
several nats. The cure is in modular_addition_orthogonal.py.
"""

from __future__ import annotations

import sys

import torch
from torch import nn

import monitor

P = 59


def main(run_dir: str | None = None, steps: int = 2000) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the sums of a float32 loss near 0 depend on how they are split
    a, b = (grid.flatten() for grid in torch.meshgrid(torch.arange(P), torch.arange(P), indexing="ij"))
    pairs = torch.cat([nn.functional.one_hot(a, P), nn.functional.one_hot(b, P)], dim=1).float()
    shuffled = torch.randperm(P * P, generator=torch.Generator().manual_seed(0))
    train = shuffled[: int(0.4 * P * P)]
    x, y = pairs[train], ((a + b) % P)[train]

    model = nn.Sequential(
        nn.Linear(2 * P, 200, bias=False),
        nn.ReLU(),
        nn.Linear(200, 200, bias=False),
        nn.ReLU(),
        nn.Linear(200, P, bias=False),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.99), eps=1e-25, weight_decay=0)
    monitor.attach(model, run_dir)

    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
