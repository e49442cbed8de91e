"""How far every parameter has moved from where the run began, from a fixed sample of one block in sixteen."""

from __future__ import annotations

import torch
from torch import Tensor

STATS = ("sumsq", "sumsq_var", "exact")
#: Elements of a block (a kilobyte of float32) and blocks per sampled block. Whole blocks, so that only a sixteenth of
#: the memory is read.
BLOCK, EVERY = 256, 16


def sample(p: Tensor) -> Tensor:
    """The part of a parameter whose distance is followed: a view, or the whole tensor where it is small.

    Args:
        p: a parameter, any shape; not copied if contiguous.

    Returns:
        ``(block, BLOCK)`` view of every sixteenth block; ``(1, numel)`` if there are fewer than 8 such blocks.
    """
    flat = p.detach().reshape(-1)
    blocks = flat.numel() // (BLOCK * EVERY)
    if blocks < 8:
        return flat.view(1, -1)
    return flat[: blocks * BLOCK * EVERY].view(blocks, EVERY, BLOCK)[:, EVERY // 2]


def distance_stats(now: Tensor, start: Tensor, numel: int) -> Tensor:
    """Estimated squared distance of a parameter from its start.

    Args:
        now: `sample` of the parameter.
        start: `sample` of it at the start, the same shape.
        numel: elements of the whole parameter.

    Returns:
        ``(3,)`` float32: estimate of the sum of squares over the whole tensor, variance of that estimate (0 if exact),
        1 if the whole tensor was read.

    Cost: a sixteenth of one read of the parameter and of its copy.
    Source: definition; cluster sample of B of N blocks: N/B sum s_b, variance N (N - B) / B times the sample variance
    of the block sums s_b (Cochran, Sampling Techniques, eq. 9A.2, equal clusters).
    """
    per_block = (now.float() - start.float()).square().sum(dim=1).double()
    if now.shape[0] == 1:
        one = torch.ones_like(per_block[0])
        return torch.stack((per_block[0], torch.zeros_like(one), one)).float()
    taken = per_block.numel()
    total = numel / BLOCK
    variance = total * (total - taken) / taken * per_block.var()
    return torch.stack((total / taken * per_block.sum(), variance, torch.zeros_like(variance))).float()
