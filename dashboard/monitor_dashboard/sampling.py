"""Series made small enough to draw, without losing an extreme or a non-finite value. Pure numpy.

A browser gets at most `MAX_POINTS` points per trace. A bucket of steps is drawn by its least, mean and largest finite
value; what a scale cannot place (NaN, ±inf, and on a log scale everything not above 0) is kept apart as oddities, to be
marked rather than hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

#: Points of one trace that a page with a dozen plots still draws fluently.
MAX_POINTS = 2_000
#: Cells of one map; columns are dropped before rows.
MAX_CELLS = 60_000
MAX_ROWS = 200
MAX_COLUMNS = 400

Oddity = Literal["NaN", "+inf", "-inf", "≤ 0"]


@dataclass(frozen=True)
class Line:
    """One series, ready to draw.

    Attributes:
        steps: ``(point,)`` where to draw; the middle of the bucket if `reduced`.
        low, mean, high: ``(point,)`` of the finite values there; NaN where there is none, which breaks the line.
        odd_steps, odd: ``(mark,)`` the first oddity of each bucket and its kind.
        odd_count: number of odd values, marked or not.
        count: recorded values.
        reduced: points stand for several values each.
        last: the last recorded value; NaN if there is none.
    """

    steps: Floats
    low: Floats
    mean: Floats
    high: Floats
    odd_steps: Ints
    odd: tuple[Oddity, ...]
    odd_count: int
    count: int
    reduced: bool
    last: float


def line(steps: Ints, values: Floats, *, log: bool = False, points: int = MAX_POINTS) -> Line:
    """A series reduced to at most ``points`` points per trace.

    Args:
        steps: ``(point,)`` increasing.
        values: ``(point,)`` as recorded.
        log: the scale is logarithmic, so values not above 0 are oddities.
        points: limit for one trace. The band of a reduced line runs along its top and back along its bottom, so there
            are half as many buckets.
    """
    drawn = np.isfinite(values)
    if log:
        drawn &= values > 0
    last = float(values[-1]) if len(values) else float("nan")
    reduced = len(steps) > points
    if reduced:
        starts, middle = _buckets(steps, points // 2)
        low, mean, high = _extremes(values, drawn, starts)
    else:
        starts, middle = np.arange(len(steps)), steps.astype(np.float64)
        low = mean = high = np.where(drawn, values, np.nan)
    marked = np.flatnonzero(~drawn)
    if len(marked):
        bucket = np.searchsorted(starts, marked, side="right")
        marked = marked[np.unique(bucket, return_index=True)[1]]
    kinds: tuple[Oddity, ...] = tuple(_kind(float(v)) for v in values[marked])
    odd_count = int((~drawn).sum())
    return Line(middle, low, mean, high, steps[marked], kinds, odd_count, len(steps), reduced, last)


def _kind(value: float) -> Oddity:
    if np.isnan(value):
        return "NaN"
    if np.isinf(value):
        return "+inf" if value > 0 else "-inf"
    return "≤ 0"


def _buckets(steps: Ints, number: int) -> tuple[Ints, Floats]:
    """Index of the first point of each non-empty bucket of equal width, and the middle step of its points."""
    first, last = int(steps[0]), int(steps[-1])
    bucket = (steps - first) * number // (last - first + 1)
    starts = np.flatnonzero(np.diff(bucket, prepend=-1))
    ends = np.append(starts[1:], len(steps)) - 1
    return starts, (steps[starts] + steps[ends]) / 2


def _extremes(values: Floats, drawn: Mask, starts: Ints) -> tuple[Floats, Floats, Floats]:
    number = np.add.reduceat(drawn.astype(np.int64), starts)
    low = np.minimum.reduceat(np.where(drawn, values, np.inf), starts)
    high = np.maximum.reduceat(np.where(drawn, values, -np.inf), starts)
    with np.errstate(invalid="ignore", over="ignore"):
        mean = np.add.reduceat(np.where(drawn, values, 0.0), starts) / np.maximum(number, 1)
    empty = number == 0
    mean = np.clip(mean, low, high)  # a sum of huge values overflows where their mean does not
    return np.where(empty, np.nan, low), np.where(empty, np.nan, mean), np.where(empty, np.nan, high)


#: What a cell of a map holds.
MISSING, VALUE, NAN, INF = 0, 1, 2, 3


@dataclass(frozen=True)
class Grid:
    """Modules × buckets of steps, ready to draw.

    Attributes:
        modules: ``row`` names, in order of execution.
        starts: ``(column,)`` first step of each bucket.
        width: steps of a bucket.
        values: ``(row, column)`` the largest finite value of the bucket; NaN if there is none.
        state: ``(row, column)`` one of `MISSING`, `VALUE`, `NAN`, `INF`; a non-finite value outranks finite ones.
        hidden: modules that were left out for want of room, those with the smallest values.
    """

    modules: tuple[str, ...]
    starts: Ints
    width: int
    values: Floats
    state: npt.NDArray[np.int8]
    hidden: int = 0


def columns(first: int, last: int, rows: int, interval: int = 1) -> tuple[int, int]:
    """Width in steps and number of the buckets of a map of ``rows`` rows over ``first`` … ``last``.

    A bucket is never narrower than ``interval``, the usual distance of two recorded steps: the map would be striped.
    """
    room = max(1, min(MAX_COLUMNS, MAX_CELLS // max(rows, 1)))
    span = last - first + 1
    width = max(-(-span // room), interval, 1)
    return width, -(-span // width)


def cells(steps: Ints, values: Floats, has: Mask, first: int, width: int, number: int) -> tuple[Floats, npt.NDArray]:
    """Largest finite value and state of each bucket.

    Args:
        steps: ``(step,)`` increasing, within the map.
        values: ``(step, row)`` as recorded.
        has: ``(step, row)`` where something was recorded.
        first: first step of the map.
        width: steps of a bucket.
        number: buckets.

    Returns:
        ``(row, number)`` values and int8 states, as in `Grid`.
    """
    rows = values.shape[1]
    top = np.full((rows, number), np.nan)
    state = np.zeros((rows, number), dtype=np.int8)
    if not len(steps):
        return top, state
    bucket = (steps - first) // width
    starts = np.flatnonzero(np.diff(bucket, prepend=-1))
    at = bucket[starts]
    finite = has & np.isfinite(values)
    high = np.maximum.reduceat(np.where(finite, values, -np.inf), starts, axis=0)
    top[:, at] = np.where(np.isneginf(high), np.nan, high).T
    for mark, where in ((VALUE, finite), (NAN, has & np.isnan(values)), (INF, has & np.isinf(values))):
        seen = np.logical_or.reduceat(where, starts, axis=0).T
        state[:, at] = np.where(seen, mark, state[:, at])
    return top, state


def worst_rows(values: Floats, state: npt.NDArray[np.int8], room: int) -> list[int]:
    """At most ``room`` rows in their order: those with a non-finite value first, then those with the largest values."""
    if len(values) <= room:
        return list(range(len(values)))
    high = np.max(np.where(np.isnan(values), -np.inf, values), axis=1)
    broken = (state >= NAN).any(axis=1)
    ranked = np.lexsort((-high, ~broken))
    return sorted(int(i) for i in ranked[:room])
