"""XOR clusters: after one step all training rows are fitted by a linear rule that does not generalise; then it does.

    python sample_runs/xor_clusters.py [RUN_DIR]

200 points of four clusters at ±μ1 (class 0) and ±μ2 (class 1) in 4,000 dimensions, a tenth of the labels flipped; two
layers of 256 ReLU units, the second fixed, full-batch gradient descent. After the first step the network has memorised
the training set, flipped labels included, and is nearly an odd function: a linear classifier, which cannot solve XOR,
so held-out accuracy is near chance. Within 60 steps it holds for new points, and goes on fitting the flipped labels.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

import monitor
from monitor.probes import OddFraction

DIMENSIONS, UNITS = 4000, 256


class Network(nn.Module):
    """One layer of ReLU units whose answers are added and subtracted."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(DIMENSIONS, UNITS, bias=False)
        nn.init.normal_(self.hidden.weight, std=1e-4)
        self.register_buffer("signs", (torch.arange(UNITS) % 2 * 2.0 - 1) / UNITS**0.5)

    def forward(self, x: Tensor) -> Tensor:
        answer = self.hidden(x).relu() @ self.signs
        return torch.stack([-answer / 2, answer / 2], dim=1)  # a logistic loss as a cross-entropy of two classes


def clusters(n: int) -> tuple[Tensor, Tensor]:
    """``n`` points and their true classes."""
    side = torch.randint(0, 4, (n,))
    centre = 14 * torch.eye(2, DIMENSIONS)[side % 2] * (side // 2 * 2 - 1)[:, None]
    return centre + torch.randn(n, DIMENSIONS), side % 2


def main(run_dir: str | None = None, steps: int = 200) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    x, y = clusters(200)
    flipped = torch.rand(200) < 0.1
    y = torch.where(flipped, 1 - y, y)
    new, truth = clusters(1000)

    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recording = monitor.attach(model, run_dir, probes=[OddFraction(new[:256], every=1)])

    for _ in range(steps):
        with torch.no_grad():
            correct = model(new).argmax(dim=1) == truth
        recording.log(test_acc=correct.float().mean().item())
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
