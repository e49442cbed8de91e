"""Handwritten digits through four layers of eight experts, two for each image: what a healthy router looks like.

    python sample_runs/moe_digits.py [RUN_DIR]

600 images, a balancing term of 0.01 and a z-loss of 0.001 on each router. The images are memorised by step 50; the
pathways of the first batch go on becoming smoother through depth for hundreds of steps. That alone says nothing about
generalisation: see moe_digits_random_labels, where the same happens to labels that cannot be learned, and
moe_digits_no_aux, where it hardly happens although the test accuracy is the same.

Three times after the images are memorised the gradients jump by a factor of 20 to 60 for some ten to fifty steps, and
the loss with them: the learning rate is constant and too large for a loss that has come to its floor. It is not the
routers that do it (a mixture that uses all its experts for every image jumps further); a learning rate that is halved
and falls makes the jumps fewer and smaller.
"""

from __future__ import annotations

import sys

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import monitor
from monitor.probes import Pathways
from monitor.remedies import z_loss

EXPERTS, TOP = 8, 2


class Layer(nn.Module):
    """A residual layer of experts, their weights fused; remembers what its balancing term is."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.router = nn.LayerNorm(width, elementwise_affine=False), nn.Linear(width, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, width, hidden) / width**0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, hidden, width) / hidden**0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.norm(x)
        scores = self.router(h)
        p = scores.softmax(-1)
        weights, chosen = p.topk(TOP)
        share = torch.zeros_like(p).scatter(1, chosen, weights / weights.sum(1, keepdim=True))
        each = torch.einsum("enh,ehd->end", F.gelu(torch.einsum("nd,edh->enh", h, self.up)), self.down)
        load = F.one_hot(chosen, EXPERTS).sum(1).float().mean(0) / TOP
        extra = 0.01 * EXPERTS * (load * p.mean(0)).sum() + z_loss(scores, coefficient=1e-3)
        return x + torch.einsum("ne,end->nd", share, each), extra


class Model(nn.Module):
    """Class scores of an image, and the terms of the routers."""

    def __init__(self, width: int = 32, layers: int = 4) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(64, width), nn.Linear(width, 10)
        self.layers = nn.ModuleList(Layer(width, 64) for _ in range(layers))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, extra = self.first(x), torch.zeros(())
        for layer in self.layers:
            x, more = layer(x)
            extra = extra + more
        return self.head(x), extra


def main(
    run_dir: str | None = None, steps: int = 1200, seed: int = 0, *, aux: bool = True, random_labels: bool = False
) -> None:
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    images, labels = (torch.tensor(a) for a in load_digits(return_X_y=True))
    images, order = (images / 16).float(), torch.randperm(len(labels))
    if random_labels:  # from a generator of their own, so that all else is as it is without
        labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    x, y, test_x, test_y = images[order[:600]], labels[order[:600]], images[order[600:]], labels[order[600:]]

    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    run = monitor.attach(model, run_dir, probes=[Pathways(every=50)])
    batches = torch.zeros(0, dtype=torch.long)
    for step in range(steps):
        if not len(batches):
            batches = torch.randperm(600)
        rows, batches = batches[:300], batches[300:]
        scores, extra = model(x[rows])
        loss = F.cross_entropy(scores, y[rows], label_smoothing=0.1) + (extra if aux else 0)
        if step % 50 == 0 or step == steps - 1:
            model.eval()
            with torch.no_grad():
                run.log(val_acc=(model(test_x)[0].argmax(1) == test_y).float().mean())
            model.train()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    run.close()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
