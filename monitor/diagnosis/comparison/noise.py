"""The noise band of a series, and where another series leaves it for good.

A series is cut into blocks of `BLOCK` points. The band at a point reaches from the lowest to the highest value of its
block and the `REACH` blocks on either side, one in `TRIM` left out at both ends of each as wild, and `WIDTH` robust
scales of the block (1.4826 MAD, at least 2^-9 of the median) beyond: a trend, or being some steps ahead, is no
difference. What is drawn on a logarithmic scale and is positive throughout gets its band there. Another series parts at
the first point outside from which on at least `PART` of `HOLD` points are outside, or at once where it has a NaN or
infinity and this one has none anywhere.

Calibration, on 8 kinds of healthy training (MLP, CNN, LSTM, GRU, transformer, auto-encoder, residual network, mixture
of experts), 4 seeds each. With one seed no bit differs in any series. The 96 pairs with two seeds differ from the
start, all of them; later, 31 of 12,300 series part (in 18 pairs of 84) without the mixture of experts, and 138 of its
3,144: which of its experts die is a matter of the seed. The loss never does.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from monitor.metric import Array, Mask
from monitor.robust import FLOOR, SIGMA_PER_MAD

#: Points of a block, blocks on either side that a band takes in, and half its width in robust scales.
BLOCK, REACH, WIDTH = 20, 2, 4.0
#: One in so many points of a block, on either side, is wild and does not widen the band.
TRIM = 8
#: A series has parted if this part of so many points is outside the band.
HOLD, PART = 20, 0.75

_FEWEST = 5  # points of a block that make a median and a scale


def band(values: Array, has: Mask, log: bool = False) -> tuple[Array, Array]:
    """The noise band of series: what their own neighbourhood makes plausible at each point.

    Args:
        values: ``(series, step)`` float64, of at least one step.
        has: ``(series, step)`` bool, True where a value was recorded; non-finite ones are left out.
        log: those that are positive throughout get their band on a logarithmic scale.

    Returns:
        ``low`` and ``high``, ``(series, step)``; where fewer than 5 values of a block were recorded, those of the
        neighbours; NaN where there are none.
    """
    usable = has & np.isfinite(values)
    positive = np.full(len(values), log) & ((values > 0) | ~usable).all(axis=1)
    x = values.copy()
    with np.errstate(divide="ignore", invalid="ignore"):
        x[positive] = np.log(values[positive])
    low, high = _edges(x, usable, positive)
    for edge in (low, high):
        edge[positive] = np.exp(edge[positive])
    own = np.where(usable, values, np.nan)  # a run is never outside its own band
    return np.fmin(low, own), np.fmax(high, own)


def _edges(values: Array, usable: Mask, logarithms: Mask) -> tuple[Array, Array]:
    """`band` of values on their own scale; ``logarithms`` ``(series,)`` says which are logarithms."""
    count, n = values.shape
    blocks = max(n // BLOCK, 1)
    size = BLOCK if n >= BLOCK else n
    with np.errstate(over="ignore"):
        x = values[:, : blocks * size].astype(np.float32).reshape(count, blocks, size)
    inside = usable[:, : blocks * size].reshape(x.shape)
    number = inside.sum(axis=2)
    ranked = np.sort(np.where(inside, x, np.float32(np.inf)), axis=-1)
    middle = _median(ranked, number)
    with np.errstate(invalid="ignore", over="ignore"):
        away = np.where(inside, np.abs(x - middle[..., None].astype(np.float32)), np.float32(np.inf))
        scale = SIGMA_PER_MAD * _median(np.sort(away, axis=-1), number)
        # the logarithm of 1 + a part is that part
        scale = WIDTH * np.maximum(scale, FLOOR * np.where(logarithms[:, None], 1.0, np.abs(middle)))
        low = _ranked(ranked, number // TRIM) - scale
        high = _ranked(ranked, number - 1 - number // TRIM) + scale
    for edge in (low, high):
        edge[number < _FEWEST] = np.nan
    block_of = np.minimum(np.arange(n) // size, blocks - 1)
    return _hull(low, np.fmin)[:, block_of], _hull(high, np.fmax)[:, block_of]


def _median(ranked: npt.NDArray[np.float32], number: npt.NDArray[np.int64]) -> Array:
    """Median of the first ``number`` values of the last axis, which is sorted."""
    return 0.5 * (_ranked(ranked, (number - 1) // 2) + _ranked(ranked, number // 2))


def _ranked(ranked: npt.NDArray[np.float32], place: npt.NDArray[np.int64]) -> Array:
    """The value at a place of the last axis; any value where there is no such place."""
    inside = np.clip(place, 0, ranked.shape[-1] - 1)
    return np.take_along_axis(ranked, inside[..., None], axis=-1)[..., 0].astype(np.float64)


def _hull(edge: Array, extreme: Callable[[Array, Array], Array]) -> Array:
    """The extreme over each block and `REACH` blocks on either side."""
    found = edge.copy()
    for k in range(1, min(REACH, edge.shape[1] - 1) + 1):
        found[:, k:] = extreme(found[:, k:], edge[:, :-k])
        found[:, :-k] = extreme(found[:, :-k], edge[:, k:])
    return found


def departures(x: Array, has_x: Mask, y: Array, has_y: Mask, low: Array, high: Array) -> npt.NDArray[np.int64]:
    """Row at which each series leaves the band of its reference for good enough, -1 if it does not.

    Args:
        x: the reference, ``(series, step)``.
        has_x: where it was recorded.
        y: the other run.
        has_y: where it was recorded.
        low: lower edge of the band of ``x``.
        high: its upper edge.

    Returns:
        ``(series,)`` int64.
    """
    both = has_x & has_y
    outside = both & ((y < low) | (y > high))
    n = x.shape[1]
    found = np.full(len(x), -1, dtype=np.int64)
    if n >= HOLD:
        wide = np.zeros((len(x), n + 1), dtype=np.int32)
        np.cumsum(outside, axis=1, out=wide[:, 1:])
        found = first_true(((wide[:, HOLD:] - wide[:, :-HOLD]) >= PART * HOLD) & outside[:, : n - HOLD + 1])
    unsound = (has_x & ~np.isfinite(x)).any(axis=1, keepdims=True)
    broken = first_true(both & ~np.isfinite(y) & ~unsound)
    return np.where(broken < 0, found, np.where(found < 0, broken, np.minimum(found, broken)))


def first_true(mask: Mask) -> npt.NDArray[np.int64]:
    """The first True of each row, -1 if there is none."""
    if not mask.shape[1]:
        return np.full(len(mask), -1, dtype=np.int64)
    return np.where(mask.any(axis=1), mask.argmax(axis=1), -1)
