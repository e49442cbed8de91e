"""Summaries of series: what a first look needs, from a few kilobytes instead of millions of values.

Each large part has one: per series its ends, extremes, moments, quantiles and a min–max band. Summaries of several
parts merge: counts, extremes and moments exactly, quantiles by mixing the parts' piecewise linear distributions.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from monitor.block import Steps
from monitor.store.layout import replacing
from monitor.store.parts import Ids, Names, Points, Values, arrow, flat, write_table

#: The quantiles that are kept, and their names.
QUANTILES = {"p01": 0.01, "p05": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "p99": 0.99}
BUCKETS = 128
#: Series of one row group of a file: of very many a reader wants few.
GROUP = 1 << 12
_PROBABILITIES = np.array(list(QUANTILES.values()))
_KNOTS = np.array([0.0, *QUANTILES.values(), 1.0])

_F64 = npt.NDArray[np.float64]
_I64 = npt.NDArray[np.int64]


class Band(NamedTuple):
    """At most 128 buckets of consecutive points, so that no extreme is lost in a small picture.

    ``steps`` int64: first step of each bucket; ``min`` and ``max`` float32: NaN where a bucket holds a NaN.
    """

    steps: Steps
    min: Values
    max: Values


@dataclass(frozen=True, eq=False)
class SeriesSummary:
    """One series in a few numbers, over everything recorded: all attempts, in the order of recording.

    Attributes:
        metric, column, module: which series.
        n: recorded values, the non-finite ones included.
        nonfinite: how many of them are NaN or infinite.
        first_step, last_step, first, last: its ends.
        min, max, mean, m2: of the finite values; ``m2`` is the sum of squared deviations from the mean. NaN if there
            are none.
        band: the picture; of ``n`` ≤ 128 values it is the data itself.
    """

    metric: str
    column: str
    module: str
    n: int
    nonfinite: int
    first_step: int
    last_step: int
    first: float
    last: float
    min: float
    max: float
    mean: float
    m2: float
    band: Band
    _knots: _F64  # (part, 9): the least value, the quantiles and the largest value of each part
    _weight: _F64  # (part,): its finite values

    @cached_property
    def quantiles(self) -> dict[str, float]:
        """``p01 … p99`` of the finite values; exact within a part, interpolated over several."""
        one = self._knots[0, 1:-1]
        mixed = one if len(self._knots) == 1 else _mixed(self._knots, self._weight)
        return dict(zip(QUANTILES, mixed.tolist(), strict=True))

    @property
    def ref(self) -> str:
        """``"metric.column"``."""
        return f"{self.metric}.{self.column}"

    @property
    def std(self) -> float:
        """Standard deviation of the finite values (divided by their number)."""
        finite = self.n - self.nonfinite
        return float(np.sqrt(self.m2 / finite)) if finite else float("nan")


_SCALARS: dict[str, Any] = {
    "n": np.int64,
    "nonfinite": np.int64,
    "first_step": np.int64,
    "last_step": np.int64,
    "first": np.float32,
    "last": np.float32,
    "min": np.float32,
    "max": np.float32,
    "mean": np.float64,
    "m2": np.float64,
}

#: Columns of a summary file.
SUMMARY_SCHEMA = pa.schema(
    [pa.field("series", pa.int32(), nullable=False)]
    + [pa.field(name, pa.from_numpy_dtype(np.dtype(t)), nullable=False) for name, t in _SCALARS.items()]
    + [pa.field(name, pa.float64(), nullable=False) for name in QUANTILES]
    + [
        pa.field(f"band_{name}", pa.list_(pa.field("element", t, nullable=False)), nullable=False)
        for name, t in (("steps", pa.int64()), ("min", pa.float32()), ("max", pa.float32()))
    ]
)

_ENCODINGS = {
    "band_steps.list.element": "DELTA_BINARY_PACKED",
    "band_min.list.element": "BYTE_STREAM_SPLIT",
    "band_max.list.element": "BYTE_STREAM_SPLIT",
}


@dataclass(frozen=True, eq=False)
class Summaries:
    """Summaries of many series as arrays.

    Attributes:
        series: ``(series,)`` int32 ids.
        scalars: name -> ``(series,)``, the columns from ``n`` to ``m2``.
        quantiles: ``(series, 7)`` float64.
        ends: ``(series + 1,)`` int32: where the buckets of each series begin in ``band``.
        band: the buckets of all series, one after the other.
    """

    series: npt.NDArray[np.int32]
    scalars: dict[str, npt.NDArray[Any]]
    quantiles: _F64
    ends: npt.NDArray[np.int32]
    band: Band


def summarise(points: Points) -> Summaries:
    """Summaries of the series in ``points``.

    Args:
        points: sorted by series, then step; every series whole.

    Returns:
        In order of id.
    """
    series, steps, values = points
    starts = np.flatnonzero(np.diff(series, prepend=-1))
    ends = np.append(starts, len(series)).astype(np.int64)
    n = np.diff(ends)
    k = len(starts)
    quantiles = np.full((k, len(QUANTILES)), np.nan)
    moments = np.full((k, 4), np.nan)
    nonfinite = np.zeros(k, dtype=np.int64)
    for i in range(k):
        ordered = np.sort(values[ends[i] : ends[i + 1]])
        if not (np.isfinite(ordered[0]) and np.isfinite(ordered[-1])):
            ordered = ordered[np.isfinite(ordered)]
            nonfinite[i] = n[i] - len(ordered)
        if len(ordered):
            wide = ordered.astype(np.float64)
            mean = wide.mean()
            wide -= mean
            moments[i] = ordered[0], ordered[-1], mean, np.square(wide).sum()
            quantiles[i] = np.interp(_PROBABILITIES * (len(ordered) - 1), np.arange(len(ordered)), ordered)
    # equal buckets of each series; reduceat wants the bucket edges of all series in one list
    buckets = np.minimum(n, BUCKETS)
    band_ends = np.append(0, np.cumsum(buckets))
    place = np.arange(band_ends[-1]) - np.repeat(band_ends[:-1], buckets)
    edges = np.repeat(starts, buckets) + place * np.repeat(n, buckets) // np.repeat(buckets, buckets)
    with np.errstate(invalid="ignore"):
        low = np.minimum.reduceat(values, edges) if k else values
        high = np.maximum.reduceat(values, edges) if k else values
    last = ends[1:] - 1
    scalars = {
        "n": n,
        "nonfinite": nonfinite,
        "first_step": steps[starts],
        "last_step": steps[last],
        "first": values[starts],
        "last": values[last],
        "min": moments[:, 0].astype(np.float32),
        "max": moments[:, 1].astype(np.float32),
        "mean": moments[:, 2],
        "m2": moments[:, 3],
    }
    return Summaries(series[starts], scalars, quantiles, band_ends.astype(np.int32), Band(steps[edges], low, high))


def joined_summaries(several: Sequence[Summaries]) -> Summaries:
    """One after the other; a series may then stand there several times."""
    if not several:
        return summarise(Points(np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.float32)))
    if len(several) == 1:
        return several[0]
    shift = np.cumsum([0] + [s.ends[-1] for s in several])
    return Summaries(
        np.concatenate([s.series for s in several]),
        {name: np.concatenate([s.scalars[name] for s in several]) for name in _SCALARS},
        np.concatenate([s.quantiles for s in several]),
        np.concatenate([[0], *(s.ends[1:] + at for s, at in zip(several, shift, strict=False))]).astype(np.int32),
        Band(*(np.concatenate(c) for c in zip(*(s.band for s in several), strict=True))),
    )


def write_summaries(path: Path, summaries: Summaries) -> None:
    """Write a summary file under a temporary name, then rename it.

    Raises:
        OSError: if it cannot be written; nothing is left behind.
    """
    ends = arrow(summaries.ends)
    columns = [arrow(summaries.series)]
    columns += [arrow(summaries.scalars[name].astype(t, copy=False)) for name, t in _SCALARS.items()]
    columns += [arrow(summaries.quantiles[:, i]) for i in range(len(QUANTILES))]
    for name, values in zip(Band._fields, summaries.band, strict=True):
        columns.append(pa.ListArray.from_arrays(ends, arrow(values), type=SUMMARY_SCHEMA.field(f"band_{name}").type))
    table = pa.Table.from_arrays(columns, schema=SUMMARY_SCHEMA)
    groups = [table.slice(i, GROUP) for i in range(0, max(table.num_rows, 1), GROUP)]
    with replacing(path, sync=True) as temp:
        write_table(temp, groups, SUMMARY_SCHEMA, _ENCODINGS)


class SummaryFile:
    """What `write_summaries` wrote, of which no more is read than is asked for.

    Args:
        path: the file.

    Raises:
        an error of `UNREADABLE`: if it is missing, damaged or something else.
    """

    def __init__(self, path: Path) -> None:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if not file.schema_arrow.equals(SUMMARY_SCHEMA):
                raise ValueError("has other columns than summaries")
            self._path, self._meta = path, file.metadata
            known = file.read(columns=["series", "n"], use_threads=False)
        self._series, self.values = flat(known.column("series")), int(flat(known.column("n")).sum())
        rows = [self._meta.row_group(i).num_rows for i in range(self._meta.num_row_groups)]
        self._ends = np.cumsum([0, *rows])
        self._groups: dict[int, Summaries] = {}
        if self._ends[-1] != len(self._series):
            raise ValueError("has lost rows")

    def read(self, ids: Ids | None = None) -> Summaries:
        """The summaries of the series ``ids`` (all without), and of some that stand beside them.

        Raises:
            an error of `UNREADABLE`: if it is damaged.
        """
        wanted = np.arange(len(self._series)) if ids is None else np.flatnonzero(np.isin(self._series, ids))
        groups = np.unique(np.searchsorted(self._ends, wanted, side="right") - 1).tolist()
        for g in groups:
            if g not in self._groups:
                self._groups[g] = self._group(g)
        return joined_summaries([self._groups[g] for g in groups])

    def _group(self, g: int) -> Summaries:
        with pq.ParquetFile(self._path, metadata=self._meta, page_checksum_verification=True) as file:
            table = file.read_row_group(g, use_threads=False).combine_chunks()
        bands, ends = [], np.zeros(1, dtype=np.int32)
        for name in Band._fields:
            (lists,) = table.column(f"band_{name}").chunks
            if lists.null_count:
                raise ValueError("holds nulls")
            ends = flat(lists.offsets)
            bands.append(flat(lists.values))
        found = Summaries(
            flat(table.column("series")),  # pyright: ignore[reportArgumentType]  # the schema was compared
            {name: flat(table.column(name)) for name in _SCALARS},
            np.stack([flat(table.column(name)) for name in QUANTILES], axis=1),  # pyright: ignore[reportArgumentType]
            ends,  # pyright: ignore[reportArgumentType]
            Band(*bands),
        )
        whole = np.array_equal(found.series, self._series[self._ends[g] : self._ends[g + 1]])
        if not whole or ends[0] != 0 or np.any(np.diff(ends) < 1) or any(len(b) != ends[-1] for b in found.band):
            raise ValueError("its bands do not fit its series")
        return found


def combine(several: Sequence[Summaries], names: Names, only: Collection[int] | None = None) -> list[SeriesSummary]:
    """Merge summaries of parts.

    Args:
        several: in the order of recording.
        names: what the ids mean; unknown ids are left out.
        only: the ids that are wanted; all without.

    Returns:
        One summary per series, in order of id.
    """
    one = joined_summaries(several)
    order = np.argsort(one.series, kind="stable")
    order = order[(one.series[order] >= 0) & (one.series[order] < len(names))]
    if only is not None:
        order = order[np.isin(one.series[order], list(only))]
    found = []
    starts = np.flatnonzero(np.diff(one.series[order], prepend=-1))
    for group in np.split(order, starts[1:]) if len(order) else ():
        band = [slice(one.ends[i], one.ends[i + 1]) for i in group]
        part = {name: values[group] for name, values in one.scalars.items()}
        n, bad = int(part["n"].sum()), int(part["nonfinite"].sum())
        weight = (part["n"] - part["nonfinite"]).astype(np.float64)
        some = weight > 0 if (weight > 0).any() else np.arange(1)
        weight, means = weight[some], part["mean"][some]
        low, high, mean, m2 = (float(part[c][some][0]) for c in ("min", "max", "mean", "m2"))
        if len(weight) > 1:
            low, high = float(part["min"][some].min()), float(part["max"][some].max())
            mean = float(np.average(means, weights=weight))
            m2 = float(part["m2"][some].sum() + np.sum(weight * (means - mean) ** 2))
        metric, column, module = names.triples[one.series[group[0]]]
        found.append(
            SeriesSummary(
                metric,
                column,
                module,
                n,
                bad,
                int(part["first_step"][0]),
                int(part["last_step"][-1]),
                float(part["first"][0]),
                float(part["last"][-1]),
                low,
                high,
                mean,
                m2,
                _thinned([Band(one.band.steps[s], one.band.min[s], one.band.max[s]) for s in band]),
                np.column_stack([part["min"][some], one.quantiles[group[some]], part["max"][some]]),
                weight,
            )
        )
    return found


def _mixed(knots: _F64, weight: _F64) -> _F64:
    """Quantiles of a mixture of piecewise linear distributions: ``knots`` ``(part, 9)``, ``weight`` ``(part,)``."""
    x = np.unique(knots)
    cumulative = np.zeros((len(x), 2))  # below x, and up to x: they differ where a value has a probability of its own
    for w, k in zip(weight, knots, strict=True):
        cumulative[:, 0] += w * (1 - np.interp(-x, -k[::-1], 1 - _KNOTS[::-1]))
        cumulative[:, 1] += w * np.interp(x, k, _KNOTS)
    return np.interp(_PROBABILITIES, cumulative.ravel() / weight.sum(), np.repeat(x, 2))


def _thinned(several: Sequence[Band]) -> Band:
    band = Band(*(np.concatenate(c) for c in zip(*several, strict=True)))
    n = len(band.steps)
    if n <= BUCKETS:
        return band
    edges = np.arange(BUCKETS) * n // BUCKETS
    with np.errstate(invalid="ignore"):
        return Band(band.steps[edges], np.minimum.reduceat(band.min, edges), np.maximum.reduceat(band.max, edges))
