"""What the user's own cross-entropy kernel did, row by row: zero losses, right answers, mass of the first choice.

Source: Prieto et al. (2025), the official code's ``zero_terms``: the share of samples whose loss is exactly 0.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

STATS = ("n", "zero", "correct", "sum_top1", "looked")
MERGE = ("sum", "sum", "sum", "sum", "sum")
#: On a CPU the first choice is looked up in all rows up to this many log-probabilities, above it in evenly spaced ones:
#: of a language model it would be the dearest read of all.
ALL = 1 << 22


def loss_rows(logp: Tensor, y: Tensor, ignore_index: int) -> Tensor | list[float]:
    """The statistics `STATS` of all rows that count.

    Args:
        logp: ``(row, class, ...)`` log-probabilities exactly as the user's kernel computed them; read only.
        y: ``(row, ...)`` int64 classes.
        ignore_index: rows with this class do not count.

    Returns:
        ``(5,)``, numbers on a CPU, else a float32 tensor: rows counted, rows with loss exactly 0; among the rows looked
        up, those whose class has the largest log-probability (ties count as right), sum of the largest probability; and
        the number of rows looked up.

    Cost: one read of ``logp``, or of `ALL` elements of it, for the row maximum and one gather; O(rows) extra memory; no
    host sync.
    """
    if logp.device.type == "cpu" and logp.dim() == 2 and logp.dtype in (torch.float32, torch.float64):
        rows, target = logp.numpy(), y.numpy()  # a call of numpy costs a fifth of one of torch's
        count = target != ignore_index
        every = np.count_nonzero(count) == len(rows)
        of_target = rows[np.arange(len(rows)), target if every else np.where(count, target, 0)]
        # odd, so that over a sequence length that is a power of two every position is met
        stride = 1 if rows.size <= ALL else (rows.size // ALL) | 1
        best, hit = rows[::stride].max(axis=1, initial=-np.inf), of_target[::stride]
        if not every:  # not before: the rows that count would be a copy of nearly all logits
            of_target, best, hit = of_target[count], best[count[::stride]], hit[count[::stride]]
        zero, right = of_target.size - np.count_nonzero(of_target), np.count_nonzero(hit >= best)
        return [float(of_target.size), float(zero), float(right), float(np.exp(best).sum()), float(best.size)]
    valid = y != ignore_index
    at_y = logp.gather(1, torch.where(valid, y, 0).unsqueeze(1)).squeeze(1)
    best = logp.amax(dim=1)
    count = torch.stack((valid, (at_y == 0) & valid, (at_y >= best) & valid)).flatten(1).sum(1)
    top1 = torch.where(valid, best.float().exp(), 0.0).sum()
    return torch.cat((count.float(), top1.float().view(1), count[:1].float()))
