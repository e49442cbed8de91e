"""Handwritten digits with one broken batch: at step 200 the inputs are 100 times too large.

    python sample_runs/digits_input_jump.py [RUN_DIR]

What a decoding bug or a missing normalisation does to one batch: the loss and the gradients jump in that step, and
Adam's second moment remembers it for hundreds of steps.
"""

from __future__ import annotations

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import monitor


def main(run_dir: str | None = None, steps: int = 400, seed: int = 0) -> None:
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
    batches = DataLoader(data, batch_size=64, shuffle=True, drop_last=True)

    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    monitor.attach(model, run_dir)

    step = 0
    while step < steps:
        for x, y in batches:
            if step == 200:
                x = x * 100
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            step += 1
            if step == steps:
                break


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
