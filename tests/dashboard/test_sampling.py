"""Making series small enough to draw loses neither an extreme nor a value that a scale cannot place."""

from __future__ import annotations

from functools import reduce
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitor_dashboard import sampling
from monitor_dashboard.sampling import INF, MAX_POINTS, MISSING, NAN, VALUE, Fold

VALUES = st.one_of(
    st.floats(allow_nan=False, width=32), st.sampled_from([float("nan"), float("inf"), -float("inf"), 0.0])
)


@given(st.lists(VALUES, min_size=1, max_size=300), st.integers(4, 60), st.integers(1, 1000))
@settings(max_examples=60, deadline=None)
def test_reduced_line_keeps_extremes(values: list[float], points: int, stride: int) -> None:
    """Oracle: invariance (reduction keeps the least and largest finite value and counts every other one)."""
    steps, array = np.arange(len(values), dtype=np.int64) * stride, np.array(values)
    line = sampling.line(steps, array, points=points)
    finite = array[np.isfinite(array)]
    assert len(line.steps) <= (points // 2 if line.reduced else points)
    assert line.odd_count == len(array) - len(finite)
    assert (line.odd_count > 0) == (len(line.odd) > 0)
    if len(finite):
        assert np.nanmin(line.low) == finite.min()
        assert np.nanmax(line.high) == finite.max()
        solid = ~np.isnan(line.mean)
        assert (line.low[solid] <= line.mean[solid]).all()
        assert (line.mean[solid] <= line.high[solid]).all()
    else:
        assert np.isnan(line.mean).all()


@given(st.lists(VALUES, max_size=300), st.lists(st.integers(0, 300), max_size=4), st.integers(4, 60), st.booleans())
@settings(max_examples=60, deadline=None)
def test_line_in_pieces_is_the_same(values: list[float], cuts: list[int], points: int, log: bool) -> None:
    """Oracle: invariance (a series that grows is drawn as one that is read at once)."""
    array = np.array(values, dtype=np.float64)
    steps = np.cumsum(1 + np.arange(len(values)) % 3)
    edges = [0, *sorted(cuts), len(values)]
    pieces = [Fold.of(steps[a:b], array[a:b], log=log, points=points) for a, b in pairwise(edges)]
    grown = reduce(Fold.then, pieces).line()
    whole = sampling.line(steps, array, log=log, points=points)
    for name in ("steps", "low", "high", "odd_steps", "odd", "odd_count", "count", "reduced", "last"):
        np.testing.assert_array_equal(getattr(grown, name), getattr(whole, name))
    largest = np.abs(array[np.isfinite(array)]).max(initial=0)
    np.testing.assert_allclose(grown.mean, whole.mean, rtol=1e-9, atol=1e-12 * largest)


def test_short_line_is_exact() -> None:
    """Oracle: closed form (nothing is reduced, a NaN breaks the line and is marked at its step)."""
    line = sampling.line(np.array([0, 1, 2, 9]), np.array([4.0, np.nan, 2.0, np.inf]))
    assert not line.reduced
    np.testing.assert_array_equal(line.mean, [4.0, np.nan, 2.0, np.nan])
    assert list(line.odd_steps) == [1, 9]
    assert line.odd == ("NaN", "+inf")
    assert np.isinf(line.last)


def test_one_step_spike_survives() -> None:
    """Oracle: planted fault (one value of a million)."""
    values = np.ones(1_000_000)
    values[123_456] = 50.0
    line = sampling.line(np.arange(1_000_000), values)
    assert len(line.steps) <= MAX_POINTS // 2
    at = int(np.nanargmax(line.high))
    assert line.high[at] == 50.0
    assert abs(line.steps[at] - 123_456) <= 1_000


def test_log_scale_marks_what_it_cannot_place() -> None:
    """Oracle: closed form (0 and negative values are marked, not dropped)."""
    line = sampling.line(np.arange(4), np.array([1.0, 0.0, -1.0, 10.0]), log=True)
    assert line.odd == ("≤ 0", "≤ 0")
    np.testing.assert_array_equal(line.low, [1.0, np.nan, np.nan, 10.0])


def test_empty_line() -> None:
    """Oracle: closed form (no points, no value)."""
    line = sampling.line(np.zeros(0, dtype=np.int64), np.zeros(0))
    assert line.count == 0
    assert np.isnan(line.last)


def test_cells_take_the_largest_and_mark_the_rest() -> None:
    """Oracle: closed form (two buckets of three steps by hand)."""
    values = np.array([[1.0, 1.0], [5.0, np.nan], [2.0, 3.0], [7.0, -np.inf], [0.0, 0.0]])
    has = np.ones_like(values, dtype=bool)
    has[4] = False
    top, state = sampling.cells(np.array([10, 11, 12, 13, 14]), values, has, first=10, width=3, number=3)
    np.testing.assert_array_equal(top, [[5.0, 7.0, np.nan], [3.0, np.nan, np.nan]])
    np.testing.assert_array_equal(state, [[VALUE, VALUE, MISSING], [NAN, INF, MISSING]])


@pytest.mark.parametrize(("span", "rows", "interval"), [(1, 1, 1), (399, 30, 1), (100_000, 77, 1), (5_000, 900, 10)])
def test_columns_fit(span: int, rows: int, interval: int) -> None:
    """Oracle: invariance (columns cover the steps, are no finer than the recording, and fit the room)."""
    width, number = sampling.columns(100, 100 + span - 1, rows, interval)
    assert width >= interval
    assert (number - 1) * width < span <= number * width
    assert rows * number <= max(sampling.MAX_CELLS, rows)


def test_rows_that_are_left_out_are_the_smallest() -> None:
    """Oracle: closed form (a broken row goes first, then the larger; order is kept)."""
    values = np.array([[1.0], [9.0], [5.0], [np.nan]])
    state = np.array([[VALUE], [VALUE], [VALUE], [NAN]], dtype=np.int8)
    assert sampling.worst_rows(values, state, 2) == [1, 3]
    assert sampling.worst_rows(values, state, 4) == [0, 1, 2, 3]
