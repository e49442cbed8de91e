"""Zeros of gradients, and how many of the others are as small as any: what float16 leaves of what it cannot hold."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from monitor.record.passes.side_by_side import SideBySide, norms

STATS = ("n", "rest", "least", "coarse", "elements")
#: Elements up to so many times the smallest are as small as that: of whole multiples of it no other one.
NEAR = 1.5


def underflow_stats(grads: Sequence[Tensor], elements: Sequence[int]) -> Tensor:
    """The statistics `STATS` of each gradient.

    Args:
        grads: `distance.sample` of each, dense and floating, of one device and dtype, none of them empty; read only.
        elements: of each whole gradient.

    Returns:
        ``(tensor, 5)`` float64 where the device has it, else float32: elements looked at; those that are not 0; the
        smallest size of these, infinite if there are none; how many are of that size; elements of the whole
        tensor. Of a sample of more than `side_by_side.MOST` elements each piece is compared with its own smallest.

    Cost: one read of each sample, a sixteenth of the tensors; a dozen operations; no host sync.
    Source: definition.
    """
    sizes = [g.numel() for g in grads]
    layout = SideBySide(sizes)
    zeros, largest, coarse = [], [], []
    for cuts, g in layout.copies(grads):
        zero = g == 0
        zeros.append(norms(zero.to(g.dtype).split(cuts), 1))
        inverse = g.abs_().reciprocal_().masked_fill_(zero, 0.0)
        most = norms(inverse.split(cuts), math.inf)
        repeats = torch.tensor(cuts).to(g.device, non_blocking=True)
        limit = (most / NEAR).to(g.dtype).repeat_interleave(repeats, output_size=len(g))
        near = (inverse >= limit).mul_(inverse > 0)
        largest.append(most)
        coarse.append(norms(near.to(g.dtype).split(cuts), 1))
    zero = layout.joined(zeros)
    n = torch.tensor([sizes, list(elements)], dtype=zero.dtype).to(zero.device, non_blocking=True)
    return torch.stack((n[0], n[0] - zero, 1 / layout.joined(largest, math.inf), layout.joined(coarse), n[1]), dim=1)
