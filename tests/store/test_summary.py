"""Summaries: exact within a part, honest over several, and no value hidden."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitor.store.parts import UNREADABLE, Names, Points
from monitor.store.summary import (
    BUCKETS,
    QUANTILES,
    SeriesSummary,
    SummaryFile,
    combine,
    joined_summaries,
    summarise,
    write_summaries,
)


def points_of(*several: np.ndarray, first: int = 0) -> Points:
    return Points(
        np.repeat(np.arange(len(several), dtype=np.int32), [len(v) for v in several]),
        np.concatenate([np.arange(first, first + len(v)) for v in several]),
        np.concatenate(several).astype(np.float32),
    )


def names(n: int) -> Names:
    return Names([("m", "c", str(i)) for i in range(n)])


def check(s: SeriesSummary, values: np.ndarray, first: int = 0, exact: bool = True) -> None:
    """Compare with NumPy over the finite values."""
    values = values.astype(np.float32)
    good = values[np.isfinite(values)].astype(np.float64)
    assert (s.n, s.nonfinite) == (len(values), len(values) - len(good))
    assert (s.first_step, s.last_step) == (first, first + len(values) - 1)
    np.testing.assert_array_equal([s.first, s.last], values[[0, -1]])
    if len(good):
        assert (s.min, s.max) == (good.min(), good.max())
        np.testing.assert_allclose(s.mean, good.mean(), rtol=1e-9, atol=1e-12 * np.abs(good).max())
        np.testing.assert_allclose(s.m2, len(good) * good.var(), rtol=1e-6, atol=1e-9 * np.square(good).sum() + 1e-300)
        if exact:
            got = [s.quantiles[q] for q in QUANTILES]
            np.testing.assert_allclose(got, np.quantile(good, list(QUANTILES.values())), rtol=1e-6, atol=1e-30)
    else:
        assert np.isnan([s.min, s.max, s.mean, s.m2, *s.quantiles.values()]).all()
    steps, low, high = s.band
    assert len(steps) <= BUCKETS and steps[0] == first
    if len(values) <= BUCKETS:
        np.testing.assert_array_equal(low, values)
        np.testing.assert_array_equal(high, values)
    with np.errstate(invalid="ignore"):
        edges = steps - first
        np.testing.assert_array_equal(low, np.minimum.reduceat(values, edges))
        np.testing.assert_array_equal(high, np.maximum.reduceat(values, edges))


some = st.lists(
    st.floats(width=32, min_value=-(2.0**60), max_value=2.0**60) | st.sampled_from([np.nan, np.inf, -np.inf, 0.0]),
    min_size=1,
    max_size=400,
).map(lambda v: np.array(v, dtype=np.float32))


@settings(max_examples=60, deadline=None)
@given(st.lists(some, min_size=1, max_size=4))
def test_one_part(several: list[np.ndarray]) -> None:
    """Oracle: dense reference. Every number is NumPy's over the finite values; the band loses no extreme and no NaN."""
    for s, v in zip(combine([summarise(points_of(*several))], names(len(several))), several, strict=True):
        check(s, v)


@settings(max_examples=60, deadline=None)
@given(some, st.lists(st.integers(1, 399), max_size=3))
def test_merging(values: np.ndarray, cuts: list[int]) -> None:
    """Oracle: invariance. Cut into parts, counts, ends, extremes and moments are those of the whole."""
    edges = [0, *sorted({c for c in cuts if c < len(values)}), len(values)]
    parts = [summarise(points_of(values[a:b], first=a)) for a, b in pairwise(edges)]
    (s,) = combine(parts, names(1))
    check(s, values, exact=len(parts) == 1)
    quantiles = list(s.quantiles.values())
    if np.isfinite(values).any():
        assert s.min <= quantiles[0] and quantiles[-1] <= s.max and (np.diff(quantiles) >= 0).all()


def test_merged_quantiles_are_close() -> None:
    """Oracle: dense reference. Over parts of different distributions, within 2 % of the range; exact for two atoms."""
    rng = np.random.default_rng(0)
    parts = [rng.normal(m, sd, n) for m, sd, n in ((0, 1, 4000), (3, 0.5, 2000), (-1, 2, 1000))]
    (s,) = combine([summarise(points_of(p)) for p in parts], names(1))
    truth = np.quantile(np.concatenate(parts), list(QUANTILES.values()))
    np.testing.assert_allclose(list(s.quantiles.values()), truth, atol=0.02 * (s.max - s.min))
    (s,) = combine([summarise(points_of(np.full(100, x))) for x in (1.0, 5.0)], names(1))
    assert [s.quantiles[q] for q in ("p01", "p25", "p75", "p99")] == [1.0, 1.0, 5.0, 5.0]


def test_spike_survives_any_merging() -> None:
    """Oracle: planted fault. One spike and one NaN in a million points are in the band of twenty merged parts."""
    values = np.sin(np.arange(1_000_000) / 1000)
    values[123_456], values[654_321] = 1e6, np.nan
    parts = [summarise(points_of(v, first=50_000 * i)) for i, v in enumerate(np.split(values, 20))]
    (s,) = combine(parts, names(1))
    steps, low, high = s.band
    spike = np.searchsorted(steps, 123_456, side="right") - 1
    hole = np.searchsorted(steps, 654_321, side="right") - 1
    assert high[spike] == 1e6 and low[spike] < 2
    assert np.flatnonzero(np.isnan(low)).tolist() == np.flatnonzero(np.isnan(high)).tolist() == [hole]
    assert (s.max, s.nonfinite) == (1e6, 1)


def test_files(tmp_path: Path) -> None:
    """Oracle: invariance. Through a file, in any number of pieces, nothing changes; anything else is no summary."""
    rng = np.random.default_rng(1)
    pieces = [summarise(points_of(rng.normal(size=n))) for n in (1, 50, 300)]
    one = joined_summaries(pieces)
    path = tmp_path / "s.parquet"
    write_summaries(path, one)
    back = SummaryFile(path).read()
    assert back.ends.tolist() == one.ends.tolist() == [0, 1, 51, 51 + BUCKETS]
    for a, b in zip((*one.band, one.quantiles), (*back.band, back.quantiles), strict=True):
        np.testing.assert_array_equal(a, b)
    assert all(np.array_equal(one.scalars[k], back.scalars[k]) for k in one.scalars)
    good = path.read_bytes()
    for at in range(0, len(good), 41):
        path.write_bytes(good[:at])
        with pytest.raises(UNREADABLE):
            SummaryFile(path).read()
    with pytest.raises(FileNotFoundError):
        SummaryFile(tmp_path / "missing.parquet")


def test_of_many_few_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: invariance, counts. One series of thousands is told by one row group, read once."""
    monkeypatch.setattr("monitor.store.summary.GROUP", 10)
    one = summarise(points_of(*np.random.default_rng(2).normal(size=(100, 7))))
    write_summaries(tmp_path / "s.parquet", one)
    read: list[int] = []
    whole = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda f, g, **kw: read.append(g) or whole(f, g, **kw))
    file = SummaryFile(tmp_path / "s.parquet")
    for wanted in ([37], [31, 38], [37, 99], []):
        some = combine([file.read(np.array(wanted, np.int32))], names(100), wanted)
        assert [(s.module, s.n, s.max) for s in some] == [(str(i), 7, one.scalars["max"][i]) for i in wanted]
    assert read == [3, 9] and len(file.read().series) == 100


@pytest.mark.parametrize("n", [1, 2, 127, 128, 129, 1000])
def test_band_of_a_constant(n: int) -> None:
    """Oracle: closed form. A constant has its value everywhere and no spread; short series are their own band."""
    (s,) = combine([summarise(points_of(np.full(n, 3.0)))], names(1))
    check(s, np.full(n, 3.0))
    assert s.std == 0.0 and len(s.band.steps) == min(n, BUCKETS) and set(s.quantiles.values()) == {3.0}
