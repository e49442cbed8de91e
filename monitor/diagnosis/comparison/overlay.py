"""Where two runs part.

All series that both recorded are laid over each other at their common steps. Two answers:

- *Identical until*: the last step up to which every common value is the same bit for bit, and the series that differ at
  the next one in the order in which a step reaches them. It needs no threshold, and of two runs with one seed it names
  the cause: what differs first cannot be a consequence. Durations are left out, which no two runs share.
- *Outside the band*: where the second run leaves the noise band of the first (`noise`) and stays out. What is outside
  within the first `HOLD` points was different from the start, and is told apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from monitor.diagnosis.comparison.noise import HOLD, band, departures, first_true
from monitor.diagnosis.text import number
from monitor.metric import SITES, Array, Block, Mask, Metric, load_metrics

if TYPE_CHECKING:
    from monitor.store.run import Run

#: What a later parting of runs that differ from the start is worth.
CALIBRATION = "two seeds alone part 1 series in 400"

_VALUES = 2_000_000  # laid over each other at a time


@dataclass(frozen=True)
class Difference:
    """A series at the first step at which two runs are not the same: ``reference`` is the first run's value."""

    ref: str
    module: str
    site: str
    step: int
    reference: float
    value: float


@dataclass(frozen=True)
class Departure(Difference):
    """A series at the step at which the second run leaves the first one's band from ``low`` to ``high``."""

    low: float
    high: float


@dataclass(frozen=True)
class Parting:
    """A run laid over the first one.

    Attributes:
        run: its place among the runs.
        series: series that both recorded at common steps; 0: there is nothing to compare.
        judged: of these, those with points enough for a band.
        first_step, last_step: of the common steps, None if there are none.
        identical_until: last common step up to which everything is the same, None if not even the first is.
        first: the series that differ at the next step, in the order in which a step reaches them; none if nothing does.
        start: the series that are outside the band from the start.
        later: those that leave it later, the earliest first.
    """

    run: int
    series: int
    judged: int
    first_step: int | None
    last_step: int | None
    identical_until: int | None
    first: tuple[Difference, ...]
    start: tuple[Departure, ...]
    later: tuple[Departure, ...]


def parting(a: Run, b: Run, place: int = 1) -> Parting:
    """Lay run ``b`` over run ``a``.

    Args:
        a: the reference.
        b: another run.
        place: what is answered as ``run``.

    Later attempts replace the steps of earlier ones, as everywhere.
    """
    order: dict[tuple[str, str], tuple[int, int]] = {}
    first: list[Difference] = []
    left: list[tuple[int, Departure]] = []
    steps: list[npt.NDArray[np.int64]] = []
    series = judged = 0
    for ref, metric, unit in _shared(a, b):
        site = metric.site
        in_b = set(b.modules(ref))
        modules = [m for m in a.modules(ref) if m in in_b]
        for some in _portions(modules, max(a.steps, b.steps)):
            at, (x, has_x), (y, has_y) = _over(a.block(ref, some), b.block(ref, some), ref)
            both = has_x & has_y
            recorded = both.any(axis=1)
            series += int(np.count_nonzero(recorded))
            if not recorded.any():
                continue
            steps.append(at)
            for m in some:
                order[ref, m] = SITES.index(site), len(order)
            for i, row in enumerate(first_true(both & (x != y) & ~(np.isnan(x) & np.isnan(y)))):
                if row >= 0:
                    first.append(Difference(ref, some[i], site, int(at[row]), float(x[i, row]), float(y[i, row])))
            if unit == "hash":
                continue
            judged += int(np.count_nonzero(both.sum(axis=1) >= HOLD))
            low, high = band(x, has_x, log=metric.plot.log)
            for i, row in enumerate(departures(x, has_x, y, has_y, low, high)):
                if row >= 0:
                    numbers = (float(v[i, row]) for v in (x, y, low, high))
                    left.append((row, Departure(ref, some[i], site, int(at[row]), *numbers)))

    def key(d: Difference) -> tuple[int, int, int]:
        return d.step, *order[d.ref, d.module]

    common = np.unique(np.concatenate([np.zeros(0, np.int64), *steps]))
    begin = min((d.step for d in first), default=None)
    same = common if begin is None else common[common < begin]
    left.sort(key=lambda found: key(found[1]))
    return Parting(
        run=place,
        series=series,
        judged=judged,
        first_step=int(common[0]) if len(common) else None,
        last_step=int(common[-1]) if len(common) else None,
        identical_until=int(same[-1]) if len(same) else None,
        first=tuple(sorted((d for d in first if d.step == begin), key=key)),
        start=tuple(d for row, d in left if row < HOLD),
        later=tuple(d for row, d in left if row >= HOLD),
    )


def first_of_each(several: Sequence[Difference]) -> list[Difference]:
    """The first series of each metric, in their order."""
    found: dict[str, Difference] = {}
    for d in several:
        found.setdefault(d.ref.partition(".")[0], d)
    return list(found.values())


def apart(d: Difference) -> str:
    """How far apart two runs are in a series, in words."""
    if isinstance(d, Departure) and not math.isnan(d.low):
        return f"{number(d.value)}, band {number(d.low)} to {number(d.high)}"
    value, reference = number(d.value), number(d.reference)
    if value == reference:  # to the digits that are shown
        return f"{value}, {number(abs(d.value - d.reference))} apart"
    return f"{value} against {reference}"


def same(p: Parting) -> str:
    """Up to where a run is the same as the first one, in words."""
    if not p.series:
        return "no series at common steps: nothing to lay over each other"
    span = f"steps {p.first_step:,} to {p.last_step:,}" if p.first_step != p.last_step else f"step {p.first_step:,}"
    if not p.first:
        return f"identical in all {p.series:,} series, {span}"
    if p.identical_until is None:
        return f"different from the start ({p.series:,} series, {span})"
    return f"identical until step {p.identical_until:,} ({p.series:,} series, {span})"


def stays(p: Parting) -> str:
    """Why no series of a run that is not the same leaves the band of the first one later on, in words."""
    judged = p.judged - len(p.start)
    if not judged:
        return f"fewer than {HOLD} common points: too few for a noise band"
    return f"none of {judged:,} series leaves the noise band later, for {HOLD} points"


def noise_band(run: Run, ref: str, module: str) -> tuple[npt.NDArray[np.int64], Array, Array]:
    """Steps, lower and upper edge of the `band` of one series over all its steps, ``(step,)`` each.

    Nothing, if it has fewer points than are judged.
    """
    block = run.block(ref, [module])
    values, has = block[ref].T, block.has(ref).T
    if np.count_nonzero(has) < HOLD:
        return np.zeros(0, np.int64), np.zeros(0), np.zeros(0)
    low, high = band(values, has, log=load_metrics()[ref.partition(".")[0]].plot.log)
    return block.steps, low[0], high[0]


def _shared(a: Run, b: Run) -> Iterator[tuple[str, Metric, str]]:
    """``(ref, metric, unit)`` of every column that both recorded and that is not a duration."""
    known = load_metrics()
    in_b = b.metrics()
    for metric, columns in a.metrics().items():
        m = known.get(metric)
        for column in columns:
            if m is None or column not in in_b.get(metric, ()) or all(c.name != column for c in m.columns):
                continue
            unit = m.column(column).unit
            if unit != "s":
                yield f"{metric}.{column}", m, unit


def _portions(modules: Sequence[str], steps: int) -> Iterator[list[str]]:
    """``modules`` so many at a time that their values fit the memory."""
    many = max(_VALUES // max(steps, 1), 1)
    for i in range(0, len(modules), many):
        yield list(modules[i : i + many])


def _over(a: Block, b: Block, ref: str) -> tuple[npt.NDArray[np.int64], tuple[Array, Mask], tuple[Array, Mask]]:
    """Two blocks at their common steps: the steps, then values and where there are any as ``(module, step)``."""
    steps, i, j = np.intersect1d(a.steps, b.steps, assume_unique=True, return_indices=True)
    several = [
        (np.ascontiguousarray(q[ref][rows].T), np.ascontiguousarray(q.has(ref)[rows].T)) for q, rows in ((a, i), (b, j))
    ]
    return steps, several[0], several[1]
