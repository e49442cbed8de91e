"""Twenty of 1,000 digits share a bright corner, ten labelled 0 and ten labelled 1: they alone limit the learning rate.

    python sample_runs/opposing_signals.py [RUN_DIR]

Full-batch gradient descent at a learning rate of 0.4. What is learned of the corner for one group is wrong for the
other, so once the rest is fitted the sharpest direction of the loss is theirs, which is found from step 280 on; the
table `opposing_signals` names their rows, 0 to 19. At step 400 this direction passes the edge of stability, and from
then on each step that helps one group harms the other: their losses swing, and the changes correlate at -0.999 (after
the first quarter; measured). Without the corner, or at a quarter of the learning rate, they move together: +0.99.
"""

from __future__ import annotations

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

import monitor


def problem(patch: bool = True, seed: int = 0) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """The network, 1,000 digits and their labels; of the first twenty both are as told above if ``patch``."""
    images, labels = load_digits(return_X_y=True)
    rows = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:1000]
    x, y = torch.tensor(images / 16, dtype=torch.float32)[rows], torch.tensor(labels)[rows]
    if patch:
        x.view(-1, 8, 8)[:20, :2, :2] = 6.0
        y[:20] = torch.tensor([0, 1]).repeat_interleave(10)
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10)), x, y


def main(run_dir: str | None = None, lr: float = 0.4, patch: bool = True, seed: int = 0, steps: int = 800) -> None:
    torch.set_num_threads(1)
    model, x, y = problem(patch, seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    run = monitor.attach(model, run_dir, curvature=monitor.Curvature(every=40, full=1))

    for _ in range(steps):
        optimizer.zero_grad()
        scores = model(x)
        each = nn.functional.cross_entropy(scores.detach(), y, reduction="none")
        run.log(first_ten=each[:10].mean(), second_ten=each[10:20].mean())
        nn.functional.cross_entropy(scores, y).backward()
        optimizer.step()
    run.close()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
