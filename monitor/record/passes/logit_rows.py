"""Statistics of rows of logits: norms, scale, margins, log Z, entropy, and how close the softmax is to collapse.

Every row is read once, in tiles that stay in cache; nothing of the size of the logits is allocated. With m the largest
logit of a row and R = sum over the other classes of exp(z_k - m) (summed without the largest, so that it does not
cancel): log Z = m + log1p(R), p_max = 1/(1+R), H = log1p(R) - E, with E = sum_k (z_k - m) exp(z_k - m) / (1+R) the
mean of the logits under the softmax, from m on. The rate of naive loss minimisation is z_y - m - E; the z-score of the
target is sqrt(K) (z_y - mean_k z_k) / |z - mean_k z_k|, and 0 for a row of equal logits.

Source: Prieto et al. (2025), Grokking at the Edge of Numerical Stability, Definitions 1-3 for the collapse, with R <= u
(u the unit roundoff, half of eps) as the exact, order-independent rule; the rest by definition.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

STATS = (
    "n", "classes", "u_nats", "sum_norm", "max_norm", "sum_cnorm", "max_cnorm", "sum_rowstd", "sumsq", "sum_z", "max_z",
    "min_z", "sum_margin", "sum_true_margin", "sum_lse", "sumsq_lse", "sum_entropy", "sum_top1", "collapsed",
    "collapsed_any", "sum_rate", "sum_zscore", "headroom_q05", "headroom_q50",
)  # fmt: skip
_OPS = {"classes": "last", "u_nats": "last", "max_norm": "max", "max_cnorm": "max", "max_z": "max", "min_z": "min"}
#: Quantiles of several micro-batches are averaged (the only statistics here that do not merge exactly).
MERGE = tuple(_OPS.get(s, "mean" if s.startswith("headroom") else "sum") for s in STATS)

#: Elements of one tile on a CPU: 512 KiB of float32, so that the dozen reads after the first come from cache.
TILE = 1 << 17
#: The same on an accelerator, where a launch costs more than the reads: 16 MiB of float32.
TILE_DEVICE = 1 << 22


def unit_roundoff(dtype: torch.dtype) -> float:
    """U = eps / 2 of a floating dtype: the largest x for which 1 + x == 1 under round-to-nearest-even."""
    return torch.finfo(dtype).eps / 2


def logit_rows(z: Tensor, y: Tensor | None, dtype: torch.dtype, valid: Tensor | None = None) -> Tensor | np.ndarray:
    """The statistics `STATS` of rows of logits.

    Args:
        z: ``(row, class)`` logits, any floating dtype, at least 2 classes; read only.
        y: ``(row,)`` int64 class of each row, or None if the targets are not classes (what is said of the true class
            is then NaN).
        dtype: the dtype in which the user's loss is computed; its unit roundoff decides what is absorbed.
        valid: ``(row,)`` bool, False for rows that do not count. Default: all count.

    Returns:
        ``(len(STATS),)``: float64 array on a CPU, float32 tensor on ``z.device`` elsewhere. Sums over rows; NaN only
        where logits are not finite.

    Cost: one read of ``z`` from memory; scratch of about four tiles (2 MiB on a CPU, 64 MiB elsewhere; a tile is one
    row where that is longer) whatever the number of rows; no host sync on an accelerator.
    Source: module docstring.
    """
    count, k = z.shape
    rows = max(1, (TILE if z.device.type == "cpu" else TILE_DEVICE) // k)
    if valid is not None and y is not None:
        y = torch.where(valid, y, 0)
    # the same formula in numpy on a CPU, where a call costs a fifth of one of torch's, and in torch elsewhere
    xp: Any = np if z.device.type == "cpu" else torch
    if xp is np:
        y, valid = (None if t is None else t.numpy() for t in (y, valid))  # pyright: ignore[reportAssignmentType]
    where = {} if xp is np else {"device": z.device}
    with np.errstate(all="ignore"):
        # one array for all tiles: what is kept of each would lie in the hole of its scratch, which then fits no other
        r = xp.empty((_KEPT, count), dtype=getattr(xp, "float64" if z.dtype == torch.float64 else "float32"), **where)
        for i in range(0, count, rows):
            r[:, i : i + rows] = _tile(xp, _wide(xp, z[i : i + rows]), None if y is None else y[i : i + rows])
        return _reduced(xp, r.astype(np.float64) if xp is np else r.double(), k, dtype, valid)


def _reduced(xp: Any, r: Any, k: int, dtype: torch.dtype, valid: Any) -> Any:
    """The statistics from what the tiles gave per row."""
    u = unit_roundoff(dtype)
    residual = r[_RESIDUAL]
    absorbed = xp.where(residual <= u, 1.0, 0.0)
    collapsed, headroom = absorbed * r[_RIGHT], xp.log(residual) - math.log(u)
    low = high = r
    n: Any = float(r.shape[1])
    if valid is not None:
        n = valid.sum()
        low, high = xp.where(valid, r, math.inf), xp.where(valid, r, -math.inf)
        headroom = xp.where(valid, headroom, math.inf)  # sorted behind the rows that count
        r, absorbed, collapsed = (
            xp.where(valid, r, 0.0),
            xp.where(valid, absorbed, 0.0),
            xp.where(valid, collapsed, 0.0),
        )
    sums, squares = r.sum(axis=1), xp.square(r[:_SQUARED]).sum(axis=1)
    top, bottom = xp.amax(high[:_EXTREME], axis=1), xp.amin(low[_LOW])
    norm, lse, cnorm, sum_z, _, _, margin, true_margin, entropy, top1, _, _, rate, zscore = sums
    values = (
        n, k, -math.log(u), norm, top[0], cnorm, top[2], cnorm / math.sqrt(k), squares[0], sum_z, top[4], bottom,
        margin, true_margin, lse, squares[1], entropy, top1, collapsed.sum(), absorbed.sum(), rate,
        zscore * math.sqrt(k),
    )  # fmt: skip
    if xp is np:
        ordered = np.sort(headroom)
        at = [max(0, math.ceil(q * n) - 1) for q in _QUANTILES]
        return np.array([*values, *ordered[at]])
    ordered = headroom.sort().values
    at = ((n * _quantiles(r.device)).ceil() - 1).clamp_min_(0).long()
    known = [v if isinstance(v, Tensor) else _number(float(v), r.device) for v in values]
    return torch.stack([*(v.double() for v in known), *ordered[at]]).float()


_QUANTILES = (0.05, 0.5)
_LEAST = float(np.finfo(np.float32).tiny)
# rows of what `_tile` returns, and how many
_KEPT = 14
_SQUARED, _EXTREME, _LOW, _RESIDUAL, _RIGHT = 2, 5, 5, 10, 11


@cache
def _quantiles(device: torch.device) -> Tensor:
    return torch.tensor(_QUANTILES, dtype=torch.float64, device=device)


@cache
def _number(value: float, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device=device)


def _wide(xp: Any, z: Tensor) -> Any:
    """A tile in float32 or better; of 16 bits, all rows at once would be as large as the logits."""
    z = z if z.dtype in (torch.float32, torch.float64) else z.float()
    return z.numpy() if xp is np else z


def _tile(xp: Any, z: Any, y: Any) -> Any:
    """``(14, row)``: what one tile gives per row. ``xp`` is numpy or torch."""
    k = z.shape[1]
    every = xp.arange(z.shape[0], device=z.device)
    top = xp.argmax(z, axis=1)
    m, low = z[every, top], xp.amin(z, axis=1)
    d = z - m[:, None]
    shift = d.sum(axis=1)
    norm = xp.sqrt(xp.einsum("ij,ij->i", z, z))
    # around the maximum: no cancellation when all logits share a large offset
    cnorm = xp.sqrt(xp.clip(xp.einsum("ij,ij->i", d, d) - xp.square(shift) / k, 0, None))
    nothing = xp.full_like(m, math.nan)
    at_y = nothing if y is None else d[every, y]
    right = nothing if y is None else xp.where(top == y, xp.ones_like(m), xp.zeros_like(m))
    # exp(-200) is 0 in every sum here; the clip keeps -inf logits (masked classes) out of 0 * inf
    d = xp.clip(d, -200, None)
    e = xp.exp(d)
    weighted = xp.einsum("ij,ij->i", e, d)  # sum_k d_k exp(d_k): the largest adds 0
    e[every, top] = 0
    residual = e.sum(axis=1)
    d[every, top] = -math.inf
    second = xp.amax(d, axis=1)
    true_margin = xp.where(right == 0, at_y, -second + 0 * at_y)
    log1p = xp.log1p(residual)
    p = 1 / (1 + residual)
    mean = weighted * p
    # equal logits have neither spread nor distance: 0 over the smallest normal number
    zscore = (at_y - shift / k) / xp.clip(cnorm, _LEAST, None)
    return xp.stack((
        norm, m + log1p, cnorm, shift + k * m, m, low, -second, true_margin, log1p - mean, p, residual, right,
        at_y - mean, zscore,
    ))  # fmt: skip
