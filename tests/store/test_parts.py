"""Parts: sorted by series, small, merged in little memory, and read back exactly."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitor.block import ColumnBlock
from monitor.store import parts as parts_module
from monitor.store.layout import part_name
from monitor.store.parts import Names, Part, Points, gather, joined, merge, visible, write_part

Cells = dict[tuple[int, int], float]  # (series, step) -> value

values = st.floats(width=32, allow_nan=False) | st.just(float("nan"))
cells = st.dictionaries(st.tuples(st.integers(0, 9), st.integers(0, 40)), values, max_size=150)


def points_of(some: Cells) -> Points:
    keys = sorted(some)
    return Points(
        np.array([k[0] for k in keys], dtype=np.int32),
        np.array([k[1] for k in keys], dtype=np.int64),
        np.array([some[k] for k in keys], dtype=np.float32),
    )


def write(folder: Path, first: int, last: int, points: Points, attempt: int = 0) -> Part:
    path = folder / part_name(attempt, first, last)
    write_part(path, [points], last - first + 1)
    return Part.open(path)


def equal(left: Points, right: Points) -> bool:
    return all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in zip(left, right, strict=True))


@settings(max_examples=60, deadline=None)
@given(cells, st.sets(st.integers(0, 11)))
def test_round_trip(some: Cells, ids: set[int]) -> None:
    """Oracle: invariance. What is written is read, bit for bit, all of it or any series."""
    with tempfile.TemporaryDirectory() as folder:
        points = points_of(some)
        part = write(Path(folder), 0, 40, points)
        assert equal(part.read(), points) and part.rows == len(some) and part.steps == 41
        wanted = points.where(np.isin(points.series, list(ids)))
        assert equal(part.read(np.array(sorted(ids), dtype=np.int32)), wanted)
        assert [p.name for p in Path(folder).iterdir()] == ["0-000000000-000000040.parquet"]


@settings(max_examples=60, deadline=None)
@given(cells, st.lists(st.integers(1, 40), max_size=4), st.sampled_from([1, 2, 7, 1000]))
def test_merge(some: Cells, cuts: list[int], batch: int) -> None:
    """Oracle: naive. Cut by steps and merged again, in any batches, gives what sorting everything gives."""
    edges = [0, *sorted(set(cuts)), 41]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts_module, "_BATCH", batch)
        parts = [
            write(Path(folder), a, b - 1, points_of({k: v for k, v in some.items() if a <= k[1] < b}))
            for a, b in pairwise(edges)
        ]
        chunks = list(merge(reversed(parts)))
        assert equal(joined(chunks), points_of(some))
        whole = [set(c.series.tolist()) for c in chunks]
        assert sum(map(len, whole)) == len(set().union(*whole))  # no series is cut


def test_row_groups_are_large(tmp_path: Path) -> None:
    """Oracle: closed form. However the rows arrive, every row group but a lone one has at least 120,000 rows."""
    n = 600_000
    points = Points(np.arange(n, dtype=np.int32) // 1000, np.arange(n) % 1000, np.zeros(n, dtype=np.float32))
    path = tmp_path / part_name(0, 0, 999)
    write_part(path, (points.where(slice(i, i + 70_001)) for i in range(0, n, 70_001)), 1000)
    meta = pq.read_metadata(path)
    sizes = [meta.row_group(g).num_rows for g in range(meta.num_row_groups)]
    assert sum(sizes) == n and min(sizes) >= 120_000 and max(sizes) <= 300_000
    assert equal(Part.open(path).read(), points)


def test_encoding_and_size(tmp_path: Path) -> None:
    """Oracle: golden. The encodings that were measured, and at most 3.5 bytes a value on drifting, noisy norms."""
    rng = np.random.default_rng(0)
    s, t = 40, 5000
    norms = np.exp(rng.normal(0, 3, (s, 1)) + rng.normal(0, 0.1, (s, t)) + np.sin(np.arange(t) / 900))
    points = Points(
        np.repeat(np.arange(s, dtype=np.int32), t), np.tile(np.arange(t), s), norms.astype(np.float32).ravel()
    )
    part = write(tmp_path, 0, t - 1, points)
    group = pq.read_metadata(part.path).row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(3)}
    assert "DELTA_BINARY_PACKED" in columns["step"].encodings and "BYTE_STREAM_SPLIT" in columns["value"].encodings
    assert {c.compression for c in columns.values()} == {"ZSTD"}
    assert part.path.stat().st_size <= 3.5 * s * t


def test_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """Oracle: planted fault. A value is never silently another one: a flip anywhere is an error, or changes nothing."""
    points = points_of({(s, t): s + t / 8 for s in range(3) for t in range(20)})
    part = write(tmp_path, 0, 19, points)
    good = part.path.read_bytes()
    noticed = 0
    for at in range(0, len(good), 2):
        bad = bytearray(good)
        bad[at] ^= 0x10
        part.path.write_bytes(bytes(bad))
        try:
            read = Part.open(part.path).read()
        except parts_module.UNREADABLE:
            noticed += 1
        else:
            assert equal(read, points)
    assert noticed > len(good) / 6


def test_gather_leaves_out_what_is_absent() -> None:
    """Oracle: closed form. Rows where something was recorded, sorted; ids in order of modules; a column's own mask."""
    steps = np.array([3, 4, 5])
    has = np.array([[True, False, False], [True, False, True], [False, False, True]])
    v = np.arange(9, dtype=np.float64).reshape(3, 3)
    v[1, 0] = np.nan
    v[2, 2] = 1e300
    names = Names([("m", "c", "z")])
    points = gather([ColumnBlock("m", "c", steps, ("x", "y", "z"), v, has)], names)
    assert names.triples == [("m", "c", "z"), ("m", "c", "x")]
    assert points.series.tolist() == [0, 0, 1, 1] and points.steps.tolist() == [4, 5, 3, 4]
    np.testing.assert_array_equal(points.values, np.array([5, np.inf, 0, np.nan], dtype=np.float32))


def test_cover_rule(tmp_path: Path) -> None:
    """Oracle: closed form. A part hides those inside its range, of its attempt only; of equals the first stays."""
    empty = joined(())
    live, series = tmp_path / "live", tmp_path / "series"
    live.mkdir()
    series.mkdir()
    large = write(series, 0, 9, empty)
    same, inside, beyond = write(live, 0, 9, empty), write(live, 3, 5, empty), write(live, 10, 12, empty)
    other = write(live, 3, 5, empty, attempt=1)
    assert visible([large, same, other, beyond, inside]) == [large, beyond, other]
