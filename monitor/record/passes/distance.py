"""How far every parameter has moved from where the run began, from a fixed sample of one block in sixteen."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from monitor.record.passes.arrays import Array, dot

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


def on_device(now: Tensor, start: Tensor, numel: int) -> Tensor:
    """`distance_stats` of tensors on an accelerator, ``(3,)`` float32; no host sync."""
    per_block = (now.float() - start.float()).square().sum(dim=1).double()
    if now.shape[0] == 1:
        one = torch.ones_like(per_block[0])
        return torch.stack((per_block[0], torch.zeros_like(one), one)).float()
    share, spread = _expansion(len(per_block), numel)
    variance = spread * per_block.var()
    return torch.stack((share * per_block.sum(), variance, torch.zeros_like(variance))).float()


def _expansion(taken: int, numel: int) -> tuple[float, float]:
    """What the sum of the blocks ``taken`` and their variance are multiplied by."""
    total = numel / BLOCK
    return total / taken, total * (total - taken) / taken
