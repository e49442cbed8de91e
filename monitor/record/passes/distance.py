"""How far every parameter has moved from where the run began, from a fixed sample of one block in sixteen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from monitor.record.passes.arrays import Array, dot
from monitor.record.passes.side_by_side import SideBySide, norms

STATS = ("sumsq", "sumsq_var", "exact")
#: Elements of a block (a kilobyte of float32) and blocks per sampled block. Whole blocks, so that only a sixteenth of
#: the memory is read.
BLOCK, EVERY = 256, 16


Flat = TypeVar("Flat", Tensor, Array)


def sample(flat: Flat) -> Flat:
    """The part of a parameter whose distance is followed: a view, or all of it where it is small.

    Args:
        flat: ``(element,)`` of a parameter.

    Returns:
        ``(block, BLOCK)`` view of every sixteenth block; ``(1, element)`` if there are fewer than 8 such blocks.
    """
    blocks = flat.shape[0] // (BLOCK * EVERY)
    if blocks < 8:
        return flat.reshape(1, -1)
    return flat[: blocks * BLOCK * EVERY].reshape(blocks, EVERY, BLOCK)[:, EVERY // 2]


def distance_stats(now: Array, start: Array, numel: int) -> tuple[float, float, float]:
    """Estimated squared distance of a parameter from its start.

    Args:
        now: `sample` of the parameter.
        start: `sample` of it at the start, the same shape.
        numel: elements of the whole parameter.

    Returns:
        The statistics `STATS`: estimate of the sum of squares over the whole tensor, variance of that estimate (0 if
        exact), 1 if the whole tensor was read.

    Cost: a sixteenth of one read of the parameter and of its copy.
    Source: definition; cluster sample of B of N blocks: N/B sum s_b, variance N (N - B) / B times the sample variance
    of the block sums s_b (Cochran, Sampling Techniques, eq. 9A.2, equal clusters).
    """
    change = now - start
    if len(change) == 1:
        return dot(change[0], change[0]), 0.0, 1.0
    per_block = np.einsum("ij,ij->i", change, change).astype(np.float64)
    share, spread = _expansion(len(per_block), numel)
    total = per_block.sum()
    apart = per_block - total / len(per_block)
    return share * float(total), spread * float(apart @ apart) / (len(per_block) - 1), 0.0


def on_device(now: Sequence[Tensor], start: Sequence[Tensor], numels: Sequence[int]) -> Tensor:
    """`distance_stats` of parameters on an accelerator, in the widest dtype it has.

    Args:
        now: `sample` of each parameter, of one device and dtype; read only.
        start: `sample` of each at the start; read only.
        numels: elements of each whole parameter.

    Returns:
        ``(parameter, 3)``; the squares are taken in float32, or float64 if the parameters are of that.

    Cost: as `distance_stats`; no host sync, and no operation that there is one of for each parameter.
    """
    device = now[0].device
    order = sorted(range(len(now)), key=lambda i: len(start[i]) > 1)  # first those that were read as a whole
    whole, cut = ([i for i in order if (len(start[i]) > 1) is many] for many in (False, True))
    parts = []
    if whole:
        total = _sums(now, start, whole)[0]
        parts.append(torch.stack((total, torch.zeros_like(total), torch.ones_like(total)), dim=1))
    if cut:
        total, squares = _sums(now, start, cut)
        n = [len(start[i]) for i in cut]
        known = [(*_expansion(b, numels[i]), 1 / b, 1 / (b - 1)) for b, i in zip(n, cut, strict=True)]
        share, spread, inverse, freedom = torch.tensor(known, dtype=total.dtype).T.to(device, non_blocking=True)
        variance = (squares - total * total * inverse).clamp_min_(0) * (freedom * spread)
        parts.append(torch.stack((share * total, variance, torch.zeros_like(total)), dim=1))
    back = torch.tensor(sorted(range(len(order)), key=order.__getitem__)).to(device, non_blocking=True)
    return torch.cat(parts).index_select(0, back)


def _sums(now: Sequence[Tensor], start: Sequence[Tensor], at: Sequence[int]) -> tuple[Tensor, Tensor]:
    """``(parameter,)``: the sum of the squared changes, and that of the squares of the blocks' sums."""
    layout = SideBySide([start[i].numel() for i in at])
    totals, squares = [], []
    for sizes, change, before in layout.copies([now[i] for i in at], [start[i] for i in at]):
        change.sub_(before).square_()
        if len(start[at[0]]) > 1:
            change, sizes = change.view(-1, BLOCK).sum(dim=1), [size // BLOCK for size in sizes]
            squares.append(norms(change.split(sizes), 2).square_())
        totals.append(norms(change.split(sizes), 1))
    total = layout.joined(totals)
    return total, layout.joined(squares) if squares else total


def _expansion(taken: int, numel: int) -> tuple[float, float]:
    """What the sum of the blocks ``taken`` and their variance are multiplied by."""
    total = numel / BLOCK
    return total / taken, total * (total - taken) / taken
