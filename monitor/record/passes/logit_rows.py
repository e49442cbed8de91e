"""Statistics of rows of logits: norms, scale, margins, log Z, entropy, and how close the softmax is to collapse.

Every row is read once, in tiles that stay in cache; nothing of the size of the logits is allocated. With m the largest
logit of a row and R = sum over the other classes of exp(z_k - m) (summed without the largest, so that it does not
cancel): log Z = m + log1p(R), p_max = 1/(1+R), H = log1p(R) - sum_k (z_k - m) exp(z_k - m) / (1+R).

Source: Prieto et al. (2025), Grokking at the Edge of Numerical Stability, Definitions 1-3 for the collapse, with R <= u
(u the unit roundoff, half of eps) as the exact, order-independent rule; the rest by definition.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

STATS = (
    "n", "classes", "u_nats", "sum_norm", "max_norm", "sum_cnorm", "max_cnorm", "sum_rowstd", "sumsq", "sum_z", "max_z",
    "min_z", "sum_margin", "sum_true_margin", "sum_lse", "sumsq_lse", "sum_entropy", "sum_top1", "collapsed",
    "collapsed_any", "headroom_q05", "headroom_q50",
)  # fmt: skip
_OPS = {"classes": "last", "u_nats": "last", "max_norm": "max", "max_cnorm": "max", "max_z": "max", "min_z": "min"}
#: Quantiles of several micro-batches are averaged (the only statistics here that do not merge exactly).
MERGE = tuple(_OPS.get(s, "mean" if s.startswith("headroom") else "sum") for s in STATS)

#: Elements of one tile: 1 MiB of float32, so that the dozen reads after the first come from cache.
TILE = 1 << 18


def unit_roundoff(dtype: torch.dtype) -> float:
    """U = eps / 2 of a floating dtype: the largest x for which 1 + x == 1 under round-to-nearest-even."""
    return torch.finfo(dtype).eps / 2


def logit_rows(z: Tensor, y: Tensor | None, dtype: torch.dtype, valid: Tensor | None = None) -> Tensor:
    """The statistics `STATS` of rows of logits.

    Args:
        z: ``(row, class)`` logits, any floating dtype, at least 2 classes; read only.
        y: ``(row,)`` int64 class of each row, or None if the targets are not classes (the true margin and the collapse
            of the true class are then NaN).
        dtype: the dtype in which the user's loss is computed; its unit roundoff decides what is absorbed.
        valid: ``(row,)`` bool, False for rows that do not count. Default: all count.

    Returns:
        ``(len(STATS),)`` float32 on ``z.device``. Sums over rows; all NaN-free unless the logits are not finite.

    Cost: one read of ``z`` from memory; 2 tiles of scratch; no host sync.
    Source: module docstring.
    """
    count, k = z.shape
    rows = max(1, TILE // k)
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    if valid is not None and y is not None:
        y = torch.where(valid, y, 0)
    tiles = [_tile(z[i : i + rows].to(wide), None if y is None else y[i : i + rows]) for i in range(0, count, rows)]
    r = (torch.cat(tiles, dim=1) if len(tiles) > 1 else tiles[0]).double()
    residual, right = r[_RESIDUAL], r[_RIGHT]
    u = unit_roundoff(dtype)
    absorbed = (residual <= u).double()
    headroom = residual.log() - math.log(u)
    if valid is None:
        n = torch.full((), float(count), dtype=torch.float64, device=z.device)
        low = high = r
    else:
        n = valid.sum().double()
        low, high = torch.where(valid, r, math.inf), torch.where(valid, r, -math.inf)
        r, absorbed = torch.where(valid, r, 0.0), torch.where(valid, absorbed, 0.0)
        headroom = torch.where(valid, headroom, math.inf)  # sorted behind the rows that count
    sums, squares = r.sum(dim=1), r[:_SQUARED].square().sum(dim=1)
    top, bottom = high[:_EXTREME].amax(dim=1), low[_LOW].amin()
    at = ((n * _quantiles(z.device)).ceil() - 1).clamp_min_(0).long()
    norm, lse, cnorm, sum_z, _, _, margin, true_margin, entropy, top1, _, _ = sums.unbind()
    constant = _constants(k, -math.log(u), z.device)
    collapsed = (absorbed * right).sum() if valid is None else torch.where(valid, absorbed * right, 0.0).sum()
    return torch.stack(
        (n, *constant, norm, top[0], cnorm, top[2], cnorm / math.sqrt(k), squares[0], sum_z, top[4], bottom, margin,
         true_margin, lse, squares[1], entropy, top1, collapsed, absorbed.sum(), *headroom.sort().values[at])
    ).float()  # fmt: skip


# rows of what `_tile` returns
_SQUARED, _EXTREME, _LOW, _RESIDUAL, _RIGHT = 2, 5, 5, 10, 11


@cache
def _quantiles(device: torch.device) -> Tensor:
    return torch.tensor([0.05, 0.5], dtype=torch.float64, device=device)


@cache
def _constants(classes: int, u_nats: float, device: torch.device) -> tuple[Tensor, ...]:
    return torch.tensor([classes, u_nats], dtype=torch.float64, device=device).unbind()


def _tile(z: Tensor, y: Tensor | None) -> Tensor:
    """``(12, row)``: what one tile gives per row."""
    k = z.shape[1]
    norm = torch.linalg.vector_norm(z, dim=1)
    m, top = z.max(dim=1)
    low = z.amin(dim=1)
    d = z - m[:, None]
    shift = d.sum(dim=1)
    # around the maximum: no cancellation when all logits share a large offset
    cnorm = (torch.linalg.vector_norm(d, dim=1).square() - shift.square() / k).clamp_min(0).sqrt()
    at_y = torch.full_like(m, math.nan) if y is None else d.gather(1, y[:, None]).squeeze(1)
    right = torch.full_like(m, math.nan) if y is None else (top == y).to(z.dtype)
    # exp(-200) is 0 in every sum here; the clamp keeps -inf logits (masked classes) out of 0 * inf
    d.clamp_(min=-200)
    e = d.exp()
    weighted = (e * d).sum(dim=1)  # sum_k d_k exp(d_k): the largest adds 0
    e.scatter_(1, top[:, None], 0.0)
    residual = e.sum(dim=1)
    d.scatter_(1, top[:, None], -math.inf)
    second = d.amax(dim=1)
    true_margin = torch.where(right == 0, at_y, -second + 0 * at_y)
    log1p = residual.log1p()
    p = 1 / (1 + residual)
    return torch.stack(
        (norm, m + log1p, cnorm, shift + k * m, m, low, -second, true_margin, log1p - weighted * p, p, residual, right)
    )
