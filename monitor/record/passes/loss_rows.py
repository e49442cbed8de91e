"""What the user's own cross-entropy kernel did, row by row: zero losses, right answers, mass of the first choice.

Source: Prieto et al. (2025), the official code's ``zero_terms``: the share of samples whose loss is exactly 0.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

STATS = ("n", "zero", "correct", "sum_top1")
MERGE = ("sum", "sum", "sum", "sum")


def loss_rows(logp: Tensor, y: Tensor, ignore_index: int) -> Tensor | list[float]:
    """The statistics `STATS` of all rows that count.

    Args:
        logp: ``(row, class, ...)`` log-probabilities exactly as the user's kernel computed them; read only.
        y: ``(row, ...)`` int64 classes.
        ignore_index: rows with this class do not count.

    Returns:
        ``(4,)``, numbers on a CPU, else a float32 tensor: rows counted, rows with loss exactly 0, rows whose class has
        the largest log-probability (ties count as right), sum of the largest probability.

    Cost: one read of ``logp`` for the row maximum and one gather; O(rows) extra memory; no host sync.
    """
    if logp.device.type == "cpu" and logp.dim() == 2 and logp.dtype in (torch.float32, torch.float64):
        rows, target = logp.numpy(), y.numpy()  # a call of numpy costs a fifth of one of torch's
        count = target != ignore_index
        if not count.all():
            rows, target = rows[count], target[count]
        of_target, best = rows[np.arange(len(rows)), target], rows.max(axis=1, initial=-np.inf)
        right = of_target >= best
        return [float(len(rows)), float((of_target == 0).sum()), float(right.sum()), float(np.exp(best).sum())]
    valid = y != ignore_index
    at_y = logp.gather(1, torch.where(valid, y, 0).unsqueeze(1)).squeeze(1)
    best = logp.amax(dim=1)
    count = torch.stack((valid, (at_y == 0) & valid, (at_y >= best) & valid)).flatten(1).sum(1)
    top1 = torch.where(valid, best.float().exp(), 0.0).sum()
    return torch.cat((count.float(), top1.float().view(1)))
