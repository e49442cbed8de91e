"""Series made small enough to draw, without losing an extreme or a non-finite value. Pure numpy.

A browser gets at most `MAX_POINTS` points per trace. A bucket of steps is drawn by its least, mean and largest finite
value; what a scale cannot place (NaN, ±inf, and on a log scale everything not above 0) is kept apart as oddities, to be
marked rather than hidden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
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
    """A series reduced to at most ``points`` points per trace, as `Fold.of` has it."""
    return Fold.of(steps, values, log=log, points=points).line()


@dataclass(frozen=True)
class Fold:
    """A series in buckets of steps, to which later steps can be added without reading the earlier ones again.

    In whatever pieces it arrives, the buckets are the same: their width is the least power of two for which there are
    few enough of them, and they begin at its multiples.

    Attributes:
        points: limit for one trace. The band of a reduced line runs along its top and back along its bottom, so there
            are half as many buckets.
        width: steps of a bucket; 1 for as long as nothing need be reduced.
        first, last, number, low, high, total: ``(bucket,)`` its first and last step; of the values that have a place on
            the scale the number, extremes and sum.
        odd_steps, odd: ``(mark,)`` the first oddity of each bucket, as `Line` has them.
        odd_count, count, final: as in `Line`.
    """

    points: int
    width: int
    first: Ints
    last: Ints
    number: Ints
    low: Floats
    high: Floats
    total: Floats
    odd_steps: Ints
    odd: Floats
    odd_count: int
    count: int
    final: float

    @staticmethod
    def of(steps: Ints, values: Floats, *, log: bool = False, points: int = MAX_POINTS) -> Fold:
        """A series by itself.

        Args:
            steps: ``(point,)`` increasing.
            values: ``(point,)`` as recorded.
            log: the scale is logarithmic, so values not above 0 are oddities.
            points: limit for one trace.
        """
        drawn = np.isfinite(values)
        if log:
            drawn &= values > 0
        low, high, total = (np.where(drawn, values, absent) for absent in (np.inf, -np.inf, 0.0))
        odd_count, final = int((~drawn).sum()), float(values[-1]) if len(values) else float("nan")
        number, odd = drawn.astype(np.int64), values[~drawn]
        return Fold(
            points, 1, steps, steps, number, low, high, total, steps[~drawn], odd, odd_count, len(steps), final
        )._fitted()  # fmt: skip

    def then(self, later: Fold) -> Fold:
        """This series and later steps of it."""
        both = {f.name: np.concatenate([getattr(x, f.name) for x in (self, later)])
                for f in fields(self) if isinstance(getattr(self, f.name), np.ndarray)}  # fmt: skip
        return replace(
            self, **both, width=max(self.width, later.width), odd_count=self.odd_count + later.odd_count,
            count=self.count + later.count, final=later.final if later.count else self.final,
        )._fitted()  # fmt: skip

    def line(self) -> Line:
        """Ready to draw."""
        empty = self.number == 0
        with np.errstate(invalid="ignore", over="ignore"):
            # a sum of huge values overflows where their mean does not
            mean = np.clip(self.total / np.maximum(self.number, 1), self.low, self.high)
        low, mean, high = (np.where(empty, np.nan, v) for v in (self.low, mean, self.high))
        kinds: tuple[Oddity, ...] = tuple(_kind(float(v)) for v in self.odd)
        middle = (self.first + self.last) / 2
        return Line(
            middle, low, mean, high, self.odd_steps, kinds, self.odd_count, self.count, self.width > 1, self.final
        )  # fmt: skip

    def _fitted(self) -> Fold:
        if self.width == 1 and len(self.first) <= self.points:
            return self
        most, width = max(self.points // 2, 1), self.width
        while len(starts := np.flatnonzero(np.diff(self.first // width, prepend=-1))) > most:
            # of n steps there are at least n / width buckets, so that narrower ones need not be tried
            width *= 2 ** max(1, math.ceil(math.log2(len(starts) / most)))
        marks = np.unique(self.odd_steps // width, return_index=True)[1]
        with np.errstate(over="ignore", invalid="ignore"):
            return replace(
                self, width=width, first=self.first[starts], last=np.maximum.reduceat(self.last, starts),
                number=np.add.reduceat(self.number, starts), low=np.minimum.reduceat(self.low, starts),
                high=np.maximum.reduceat(self.high, starts), total=np.add.reduceat(self.total, starts),
                odd_steps=self.odd_steps[marks], odd=self.odd[marks],
            )  # fmt: skip


def _kind(value: float) -> Oddity:
    if np.isnan(value):
        return "NaN"
    if np.isinf(value):
        return "+inf" if value > 0 else "-inf"
    return "≤ 0"


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
    Its width is a round number in the binary sense: that of a growing run changes with each quarter that is added.
    """
    room = max(1, min(MAX_COLUMNS, MAX_CELLS // max(rows, 1)))
    span = last - first + 1
    width = -(-span // room)
    unit = 1 << max(0, width.bit_length() - 3)
    width = max(-(-width // unit) * unit, interval, 1)
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
