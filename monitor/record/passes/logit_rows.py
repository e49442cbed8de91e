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
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from monitor.curvature.precision import widest
from monitor.record.passes.arrays import Array

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
#: The same on an accelerator, where a launch costs more than the reads: 64 MiB of float32.
TILE_DEVICE = 1 << 24


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
        ``(len(STATS),)``: float64 array on a CPU, a tensor on ``z.device`` elsewhere. Sums over rows; NaN only
        where logits are not finite.

    Cost: one read of ``z`` from memory; on a CPU scratch of about four tiles (2 MiB; a tile is one row where that is
    longer) whatever the number of rows; elsewhere as `on_device`.
    Source: module docstring.
    """
    if z.device.type != "cpu":
        return on_device(z, y, dtype, None if valid is None else ~valid)
    count, k = z.shape
    rows = max(1, TILE // k)
    if valid is not None and y is not None:
        y = torch.where(valid, y, 0)
    classes, counted = (None if t is None else t.numpy() for t in (y, valid))
    with np.errstate(all="ignore"):
        # one array for all tiles: what is kept of each would lie in the hole of its scratch, which then fits no other
        r = np.empty((_KEPT, count), dtype=np.float64 if z.dtype == torch.float64 else np.float32)
        for i in range(0, count, rows):
            r[:, i : i + rows] = _tile(
                _wide(z[i : i + rows]).numpy(), None if classes is None else classes[i : i + rows]
            )
        return _reduced(r.astype(np.float64), k, dtype, counted)


def _reduced(r: Array, k: int, dtype: torch.dtype, valid: Array | None) -> Array:
    """The statistics from what the tiles gave per row."""
    u = unit_roundoff(dtype)
    residual = r[_RESIDUAL]
    absorbed = np.where(residual <= u, 1.0, 0.0)
    collapsed, headroom = absorbed * r[_RIGHT], np.log(residual) - math.log(u)
    low = high = r
    n = float(r.shape[1])
    if valid is not None:
        n = valid.sum()
        low, high = np.where(valid, r, math.inf), np.where(valid, r, -math.inf)
        headroom = np.where(valid, headroom, math.inf)  # sorted behind the rows that count
        r, absorbed, collapsed = (
            np.where(valid, r, 0.0),
            np.where(valid, absorbed, 0.0),
            np.where(valid, collapsed, 0.0),
        )
    sums, squares = r.sum(axis=1), np.square(r[:_SQUARED]).sum(axis=1)
    top, bottom = np.amax(high[:_EXTREME], axis=1), np.amin(low[_LOW])
    norm, lse, cnorm, sum_z, _, _, margin, true_margin, entropy, top1, _, _, rate, zscore = sums
    ordered = np.sort(headroom)
    return np.array([
        n, k, -math.log(u), norm, top[0], cnorm, top[2], cnorm / math.sqrt(k), squares[0], sum_z, top[4], bottom,
        margin, true_margin, lse, squares[1], entropy, top1, collapsed.sum(), absorbed.sum(), rate,
        zscore * math.sqrt(k), *ordered[_ranks(n)],
    ])  # fmt: skip


def _ranks(n: float) -> list[int]:
    """Where the quantiles of ``n`` numbers stand in their order."""
    return [max(0, math.ceil(q * n) - 1) for q in _QUANTILES]


_QUANTILES = (0.05, 0.5)
_LEAST = float(np.finfo(np.float32).tiny)
# rows of what `_tile` returns, and how many
_KEPT = 14
_SQUARED, _EXTREME, _LOW, _RESIDUAL, _RIGHT = 2, 5, 5, 10, 11


def _wide(z: Tensor) -> Tensor:
    """A tile in float32 or better; of 16 bits, all rows at once would be as large as the logits."""
    return z if z.dtype in (torch.float32, torch.float64) else z.float()


def _tile(z: Array, y: Array | None) -> Array:
    """``(14, row)``: what one tile gives per row."""
    k = z.shape[1]
    every = np.arange(z.shape[0])
    top = np.argmax(z, axis=1)
    m, low = z[every, top], np.amin(z, axis=1)
    d = z - m[:, None]
    shift = d.sum(axis=1)
    norm = np.sqrt(np.einsum("ij,ij->i", z, z))
    # around the maximum: no cancellation when all logits share a large offset
    cnorm = np.sqrt(np.clip(np.einsum("ij,ij->i", d, d) - np.square(shift) / k, 0, None))
    nothing = np.full_like(m, math.nan)
    at_y = nothing if y is None else d[every, y]
    right = nothing if y is None else np.where(top == y, np.ones_like(m), np.zeros_like(m))
    # exp(-200) is 0 in every sum here; the clip keeps -inf logits (masked classes) out of 0 * inf
    d = np.clip(d, -_DEEP, None)
    e = np.exp(d)
    weighted = np.einsum("ij,ij->i", e, d)  # sum_k d_k exp(d_k): the largest adds 0
    e[every, top] = 0
    residual = e.sum(axis=1)
    d[every, top] = -math.inf
    second = np.amax(d, axis=1)
    true_margin = np.where(right == 0, at_y, -second + 0 * at_y)
    log1p = np.log1p(residual)
    p = 1 / (1 + residual)
    mean = weighted * p
    # equal logits have neither spread nor distance: 0 over the smallest normal number
    zscore = (at_y - shift / k) / np.clip(cnorm, _LEAST, None)
    return np.stack((
        norm, m + log1p, cnorm, shift + k * m, m, low, -second, true_margin, log1p - mean, p, residual, right,
        at_y - mean, zscore,
    ))  # fmt: skip


# ---- the same on an accelerator, where what counts is the number of operations

#: Below the largest logit by so many nats there is nothing in any sum.
_DEEP = 200.0
#: What is made of each row of logits there. Those called squared, absorbed and collapsed begin as something else.
_ROWS = (
    "norm", "lse", "norm squared", "lse squared", "std", "total", "second", "wrong margin", "entropy", "p", "lost",
    "zscore", "absorbed", "collapsed", "top", "low", "residual",
)  # fmt: skip
_AT = {name: i for i, name in enumerate(_ROWS)}
#: What stands in their place in a row of logits that does not count.
_FILL = {"top": -math.inf, "low": math.inf, "residual": math.inf}


def on_device(z: Tensor, y: Tensor | None, dtype: torch.dtype, ignored: Tensor | None) -> Tensor:
    """The statistics `STATS` in about 45 operations, without waiting for the device.

    Args:
        z: as in `logit_rows`.
        y: as there.
        dtype: as there.
        ignored: ``(row,)`` bool, True for rows that do not count. Default: all count.

    Returns:
        ``(len(STATS),)`` on ``z.device``: float64 where it has that, else float32.

    Cost: six reads of ``z``; scratch of one tile (64 MiB of float32).
    """
    count, k = z.shape
    u = unit_roundoff(dtype)
    if y is not None and ignored is not None:
        y = y.masked_fill(ignored, 0)
    part = max(1, TILE_DEVICE // k)
    tiles = [_tile_on_device(z[i : i + part], None if y is None else y[i : i + part]) for i in range(0, count, part)]
    m, low, std, mean, total, norm, gap, second, residual, weighted = (
        tiles[0] if len(tiles) == 1 else torch.cat(tiles, 1)
    )
    log1p, p = residual.log1p(), (residual + 1).reciprocal_()
    below = weighted * p  # the mean of the logits under the softmax, from the largest on
    wrong = torch.where(gap == 0, second, gap)
    zscore = (m - gap - mean) / std.clamp_min(_LEAST)
    lse = m + log1p
    rows = torch.stack((
        norm, lse, norm, lse, std, total, second, wrong, log1p - below, p, gap + below, zscore, residual,
        residual + gap, m, low, residual,
    )).to(widest(z.device))  # fmt: skip
    rows[_AT["norm squared"] : _AT["lse squared"] + 1].square_()
    # a target that is not the largest leaves a residual of at least 1, or stands lower than any roundoff
    rows[_AT["absorbed"] : _AT["collapsed"] + 1].le_(u)
    if ignored is not None:
        rows = torch.where(ignored, _fill(z.device, rows.dtype), rows)
    lowest, highest = torch.aminmax(rows, dim=1)
    ordered = rows[_AT["residual"]].sort().values
    if ignored is None:
        n = rows.new_full((1,), float(count))
        at = _all_ranks(z.device, count)[:, count]
    else:
        counted = (count - ignored.sum()).view(1)
        n = counted.to(rows.dtype)
        at = _all_ranks(z.device, count).index_select(1, counted).view(-1)
    base = torch.cat((rows.sum(1), lowest, highest, ordered.index_select(0, at).log_(), n))
    order, factor, offset = _final(z.device, rows.dtype, k, u)
    return torch.addcmul(offset, base.index_select(0, order), factor)


def _tile_on_device(z: Tensor, y: Tensor | None) -> Tensor:
    """What one tile gives per row, ``(10, row)``.

    Its largest and smallest logit; their standard deviation, mean, sum and norm; how far the target is below the
    largest and the second above it (at most 0); without the largest, the sum of the exponentials of all, from the
    largest on, and that of their products with the exponents.
    """
    wide = _wide(z)
    m, top = wide.max(dim=1)
    std, mean = torch.std_mean(wide, dim=1, correction=0)
    total = wide.sum(1)  # of a masked class -inf, where that mean is NaN
    norm, low = torch.linalg.vector_norm(wide, dim=1), wide.amin(dim=1)
    gap = torch.full_like(m, math.nan) if y is None else m - wide.gather(1, y.unsqueeze(1)).squeeze(1)
    d = wide - m.unsqueeze(1) if wide is z else wide.sub_(m.unsqueeze(1))
    d.scatter_(1, top.unsqueeze(1), -_DEEP)
    second = d.amax(dim=1)
    e = d.exp_()
    residual = e.sum(1)
    weighted = torch.xlogy(e, e, out=e).sum(1)
    weighted.add_(m, alpha=0)  # of an infinite logit NaN
    return torch.stack((m, low, std, mean, total, norm, gap, second, residual, weighted))


@lru_cache(maxsize=8)
def _fill(device: torch.device, dtype: torch.dtype) -> Tensor:
    """``(len(_ROWS), 1)``: what a row that does not count has."""
    return torch.tensor([[_FILL.get(name, 0.0)] for name in _ROWS], dtype=dtype).to(device, non_blocking=True)


def _all_ranks(device: torch.device, count: int) -> Tensor:
    """``(quantile, n)`` int64 `_ranks` of n numbers, for every n up to ``count`` at least."""
    return _ranks_up_to(device, 1 << count.bit_length())


@lru_cache(maxsize=16)
def _ranks_up_to(device: torch.device, most: int) -> Tensor:
    return torch.tensor([_ranks(n) for n in range(most)]).T.contiguous().to(device, non_blocking=True)


@lru_cache(maxsize=32)
def _final(device: torch.device, dtype: torch.dtype, k: int, u: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of every statistic its place behind the sums, minima and maxima of `_ROWS`, a factor and what is added."""
    low, high, behind = len(_ROWS), 2 * len(_ROWS), 3 * len(_ROWS)
    q05, q50, n = behind, behind + 1, behind + 2
    made: dict[str, tuple[int, float, float]] = {
        "n": (n, 1, 0),
        "classes": (n, 0, k),
        "u_nats": (n, 0, -math.log(u)),
        "sum_norm": (_AT["norm"], 1, 0),
        "max_norm": (high + _AT["norm"], 1, 0),
        "sum_cnorm": (_AT["std"], math.sqrt(k), 0),
        "max_cnorm": (high + _AT["std"], math.sqrt(k), 0),
        "sum_rowstd": (_AT["std"], 1, 0),
        "sumsq": (_AT["norm squared"], 1, 0),
        "sum_z": (_AT["total"], 1, 0),
        "max_z": (high + _AT["top"], 1, 0),
        "min_z": (low + _AT["low"], 1, 0),
        "sum_margin": (_AT["second"], -1, 0),
        "sum_true_margin": (_AT["wrong margin"], -1, 0),
        "sum_lse": (_AT["lse"], 1, 0),
        "sumsq_lse": (_AT["lse squared"], 1, 0),
        "sum_entropy": (_AT["entropy"], 1, 0),
        "sum_top1": (_AT["p"], 1, 0),
        "collapsed": (_AT["collapsed"], 1, 0),
        "collapsed_any": (_AT["absorbed"], 1, 0),
        "sum_rate": (_AT["lost"], -1, 0),
        "sum_zscore": (_AT["zscore"], 1, 0),
        "headroom_q05": (q05, 1, -math.log(u)),
        "headroom_q50": (q50, 1, -math.log(u)),
    }
    place, factor, offset = zip(*(made[name] for name in STATS), strict=True)
    numbers = torch.tensor((factor, offset), dtype=dtype).to(device, non_blocking=True)
    return torch.tensor(place).to(device, non_blocking=True), numbers[0], numbers[1]
