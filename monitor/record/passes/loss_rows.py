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
#: Log-probabilities of which a copy is made, where rows do not lie one after another.
TILE = 1 << 17
#: Rows of which it is looked up whether another class, before the target, has the same largest number.
TIED = 256


def loss_rows(logp: Tensor, y: Tensor, ignore_index: int, z: Tensor) -> Tensor | list[float]:
    """The statistics `STATS` of all rows that count.

    Args:
        logp: ``(row, class, ...)`` log-probabilities exactly as the user's kernel computed them; read only.
        y: ``(row, ...)`` int64 classes.
        ignore_index: rows with this class do not count.
        z: the logits, of the shape of ``logp``; read only. Of 16 bits they tell apart what log-probabilities, whose
            numbers are larger, no more do: then the first choice is theirs.

    Returns:
        ``(5,)``, numbers on a CPU, else a float32 tensor: rows counted, rows with loss exactly 0; among the rows looked
        up, those whose class is the first choice (`right`), sum of the largest probability; and the number of rows
        looked up.

    Cost: one read of ``logp``, or of `ALL` elements of it, for the row maximum and one gather, of 16 bits also one of
    ``z``; O(rows) extra memory; no host sync.
    """
    if logp.device.type == "cpu" and logp.dim() == 2 and logp.dtype in (torch.float32, torch.float64):
        rows, target = logp.numpy(), y.numpy()  # a call of numpy costs a fifth of one of torch's
        count = target != ignore_index
        every = np.count_nonzero(count) == len(rows)
        of_target = rows[np.arange(len(rows)), target if every else np.where(count, target, 0)]
        # odd, so that over a sequence length that is a power of two every position is met
        stride = 1 if rows.size <= ALL else (rows.size // ALL) | 1
        best, hit = _first(rows[::stride], target[::stride])
        if not every:  # not before: the rows that count would be a copy of nearly all logits
            of_target, best, hit = of_target[count], best[count[::stride]], hit[count[::stride]]
        zero, n_right = of_target.size - np.count_nonzero(of_target), np.count_nonzero(hit)
        return [float(of_target.size), float(zero), float(n_right), float(np.exp(best).sum()), float(best.size)]
    if logp.device.type != "cpu":
        return on_device(logp, y, y == ignore_index, z)
    valid = y != ignore_index
    at_y = logp.gather(1, torch.where(valid, y, 0).unsqueeze(1)).squeeze(1)
    if logp.dtype.itemsize == 2:
        best, n_right = logp.amax(dim=1), right(z, y, valid)
    else:
        best, n_right = _largest(logp, y, valid, at_y)
    count = torch.stack((valid, (at_y == 0) & valid)).flatten(1).sum(1)
    top1 = torch.where(valid, best.float().exp(), 0.0).sum()
    return torch.cat((count.float(), n_right.float().view(1), top1.float().view(1), count[:1].float()))


def on_device(logp: Tensor, y: Tensor, ignored: Tensor, z: Tensor) -> Tensor:
    """The same in nine operations, as `loss_rows` does on an accelerator.

    A loss of exactly 0 is one of a first choice: there is no second class beside a probability of 1.

    Args:
        logp: as there.
        y: as there.
        ignored: ``(row, ...)`` bool, True for rows that do not count.
        z: as there.
    """
    if logp.dtype.itemsize == 2:
        top = z.argmax(dim=1)
        best = logp.gather(1, top.unsqueeze(1)).squeeze(1).float()
    else:
        best, top = logp.max(dim=1)
    missed = top != y
    rows = best.new_ones((len(STATS), *best.shape), dtype=torch.float32)
    torch.ge(best, missed, out=rows[1])
    torch.exp(best, out=rows[3])
    torch.gt(rows[3], missed, out=rows[2])  # not of NaN
    return rows.masked_fill_(ignored, 0).flatten(1).sum(1)


def right(z: Tensor, y: Tensor, valid: Tensor) -> Tensor:
    """How many rows that count have their class as the first choice, as ``(z.argmax(1) == y).sum()``; 0-d.

    Of several largest logits the first is the choice: a model that says the same of all classes is right where the
    class is 0, and not everywhere. Where a logit of a row is NaN it has no choice.

    Args:
        z: ``(row, class, ...)`` logits or log-probabilities; read only.
        y: ``(row, ...)`` int64 classes, whatever they are where ``valid`` is not.
        valid: ``(row, ...)`` bool, False for rows that do not count.

    Cost: one read of ``z``. On a CPU, of 16 bits and where ``z`` has more than two dimensions the choice of `TIED` rows
    is looked at, and of all only the largest logit, for a tenth of the time: exact up to `TIED` rows and wherever no
    logits are equal.
    """
    if z.device.type == "cpu" and z.dim() == 2 and z.dtype in (torch.float32, torch.float64):
        hit = _first(z.detach().numpy(), y.numpy())[1]
        return torch.tensor(np.count_nonzero(hit & valid.numpy()))
    return _largest(z, y, valid, z.gather(1, torch.where(valid, y, 0).unsqueeze(1)).squeeze(1))[1]


def _first(rows: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest number of each row, and whether the target is the first place where it stands; never of NaN."""
    # of rows that do not lie one after another argmax makes a copy: a tile of them at a time
    part = len(rows) if rows.flags.c_contiguous else max(1, TILE // rows.shape[1])
    top = np.concatenate([rows[i : i + part].argmax(axis=1) for i in range(0, max(1, len(rows)), max(1, part))])
    best = rows[np.arange(len(rows)), top]
    return best, (top == target) & (best == best)


def _largest(z: Tensor, y: Tensor, valid: Tensor, at_y: Tensor) -> tuple[Tensor, Tensor]:
    """The largest number of each row, and the number of rows that `right` counts."""
    if z.device.type != "cpu":
        best, top = z.max(dim=1)
        return best, ((top == y) & (at_y >= best) & valid).sum()
    best = z.amax(dim=1)
    hit = ((at_y >= best) & valid).nonzero()
    if len(hit) == 0:
        return best, torch.tensor(0)
    n, *place = hit[:: -(-len(hit) // TIED)].unbind(1)
    first = z[n, :, *place].argmax(1) == y[n, *place]
    return best, len(hit) * first.sum() / len(first)
