"""The tail: what is written is read, and what is damaged ends the reading without ever raising."""

from __future__ import annotations

import os
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitor.block import Layout, Segment
from monitor.store import tail as tail_module
from monitor.store.tail import TailWriter, read_rows, read_tail
from tests.store.kit import make_layout, value_at


def payload(layout: Layout, step: int) -> bytes:
    return np.array([value_at(step, i) for i in range(layout.size)], dtype=np.float32).tobytes()


def written(folder: Path, steps: int = 5) -> bytes:
    """The bytes of a segment with two layouts."""
    tail = TailWriter(folder, 0, 0)
    for number, modules in enumerate((("x", "y"), ("x",))):
        layout = make_layout(modules, number)
        tail.layout(layout)
        for step in range(number * steps, (number + 1) * steps):
            tail.row(step, number, payload(layout, step))
    tail.close()
    (path,) = folder.iterdir()
    return path.read_bytes()


def rows_of(data: bytes) -> list[tuple[int, list[float]]]:
    blocks, _, _ = read_rows(data)
    return [(s, r.tolist()) for b in blocks for s, r in zip(b.steps.tolist(), b.rows, strict=True)]


def expected(steps: int) -> list[tuple[int, list[float]]]:
    return [(s, [value_at(s, i) for i in range(5 if s < steps else 3)]) for s in range(2 * steps)]


def test_round_trip(tmp_path: Path) -> None:
    """Oracle: invariance. Rows come back in order under the layout they were written with; nothing is amiss."""
    data = written(tmp_path)
    blocks, fault, cut = read_rows(data)
    assert rows_of(data) == expected(5) and (fault, cut) == (None, False)
    assert [b.layout.number for b in blocks] == [0, 1] and blocks[0].layout == make_layout(("x", "y"), 0)


def test_frame_is_as_documented(tmp_path: Path) -> None:
    """Oracle: golden. The frame that the module docstring describes, packed by hand."""
    body = struct.pack("<qI", 7, 0) + struct.pack("<f", 1.5)
    rest = struct.pack("<IB", len(body), 2) + body
    layout = Layout(0, (Segment("whole", ("value",), ("",), 0),))
    tail = TailWriter(tmp_path, 3, 7)
    tail.layout(layout)
    tail.row(7, 0, struct.pack("<f", 1.5))
    data = (tmp_path / "3-000000007.tail").read_bytes()
    assert data.endswith(b"\xb5TF1" + struct.pack("<I", zlib.crc32(rest)) + rest)
    tail.close()


def test_damage_at_every_byte(tmp_path: Path) -> None:
    """Oracle: planted fault. A flipped byte anywhere ends the reading there, says so, and spoils no earlier row."""
    data, all_rows = written(tmp_path, 3), expected(3)
    for at in range(len(data)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(data)
            damaged[at] ^= flip
            rows = rows_of(bytes(damaged))
            assert rows == all_rows[: len(rows)] and len(rows) < len(all_rows)
            assert read_rows(bytes(damaged))[1]


def test_cut_at_every_byte(tmp_path: Path) -> None:
    """Oracle: planted fault. A file cut anywhere gives every whole row before the cut, and only a cut is called one."""
    data, all_rows = written(tmp_path, 3), expected(3)
    ends, previous = [], -1
    for at in range(len(data) + 1):
        rows = rows_of(data[:at])
        _, fault, cut = read_rows(data[:at])
        assert rows == all_rows[: len(rows)] and cut == (fault is not None)
        assert len(rows) in (max(previous, 0), previous + 1)
        if not cut:
            ends.append(at)
        previous = len(rows)
    assert len(ends) == 1 + 2 + 6 and previous == 6  # nothing, two layouts, six rows


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    """Oracle: invariance. Bytes from anywhere are never the cause of an exception."""
    blocks, fault, _ = read_rows(data)
    assert not blocks and (fault is None) == (data == b"")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[" * 100_000,
        b"{}",
        b"7",
        b'{"number": 0, "segments": 3}',
        b'{"number": 0, "segments": [{"reads": "a", "stats": ["v"], "modules": [""], "offset": -1}]}',
        b'{"number": 0, "segments": [{"reads": "a", "stats": ["v", "v"], "modules": [""], "offset": 0}]}',
        b'{"number": 0, "segments": [{"reads": "a", "stats": null, "modules": [""], "offset": 0}]}',
    ],
)
def test_nonsense_layout(body: bytes) -> None:
    """Oracle: planted fault. A layout that is none, but rightly check-summed, is a bad frame like any other."""
    rest = struct.pack("<IB", len(body), 1) + body
    frame = b"\xb5TF1" + struct.pack("<I", zlib.crc32(rest)) + rest
    assert read_rows(frame)[0] == [] and "layout that makes no sense" in str(read_rows(frame)[1])


def test_rows_that_no_layout_describes(tmp_path: Path) -> None:
    """Oracle: planted fault. Wrong length, unknown layout, a step that does not grow: each ends the reading."""
    for step, number, size in ((1, 0, 4), (1, 1, 5), (0, 0, 5)):
        tail = TailWriter(tmp_path, 0, 0)
        tail.layout(make_layout())
        tail.row(0, 0, payload(make_layout(), 0))
        tail.row(step, number, bytes(4 * size))
        tail.row(2, 0, payload(make_layout(), 2))
        tail.close()
        (path,) = tmp_path.iterdir()
        assert [s for s, _ in rows_of(path.read_bytes())] == [0] and read_rows(path.read_bytes())[1]


def test_segments(tmp_path: Path) -> None:
    """Oracle: closed form. A rotated tail repeats the layout; only segments whose rows all stand in parts go."""
    room = tmp_path / "rank0" / "tail"
    room.mkdir(parents=True)
    layout = make_layout()
    tail = TailWriter(room, 1, 0)
    tail.layout(layout)
    for step in range(10):
        tail.row(step, 0, payload(layout, step))
        if step % 4 == 3:
            tail.rotate(step + 1)
    assert [(s.attempt, s.first, sum(len(b.steps) for b in s.blocks)) for s in read_tail(tmp_path)] == [
        (1, 0, 4),
        (1, 4, 4),
        (1, 8, 2),
    ]
    tail.drop(6)
    assert [s.first for s in read_tail(tmp_path)] == [4, 8]
    tail.drop(9)  # the segment that is being written stays
    assert [s.first for s in read_tail(tmp_path)] == [8]
    assert tail.holds(9) and not tail.holds(10)
    tail.close()
    tail.drop(9)
    assert read_tail(tmp_path) == []


def test_one_write_a_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: closed form. n rows are n system calls, after one for the layout."""
    calls: list[int] = []
    write = os.write

    def counted(fd: int, data: bytes) -> int:
        calls.append(len(data))
        return write(fd, data)

    monkeypatch.setattr(tail_module.os, "write", counted)
    written(tmp_path, 5)
    assert len(calls) == 2 + 10


def test_forked_child_writes_nothing(tmp_path: Path) -> None:
    """Oracle: invariance. Rows, layouts and rotations of a forked child leave the files as they are."""
    tail = TailWriter(tmp_path, 0, 0)
    tail.layout(make_layout())
    tail.row(0, 0, payload(make_layout(), 0))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    child = os.fork()
    if child == 0:
        try:
            tail.row(1, 0, payload(make_layout(), 1))
            tail.layout(make_layout(("z",), 1))
            tail.rotate(2)
            tail.row(2, 1, payload(make_layout(("z",), 1), 2))
            tail.close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    tail.close()


def test_disk_that_refuses_and_recovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: planted fault. A torn write is undone, rows are dropped for a minute, then a clean segment begins."""
    now = [0.0]
    monkeypatch.setattr(tail_module.time, "monotonic", lambda: now[0])
    layout, write, full = make_layout(), os.write, [False]
    monkeypatch.setattr(tail_module.os, "write", lambda fd, data: write(fd, data[: 20 if full[0] else None]))
    room = tmp_path / "rank0" / "tail"
    room.mkdir(parents=True)
    tail = TailWriter(room, 0, 0)
    tail.layout(layout)
    for step in range(8):
        full[0] = step in (2, 3)
        now[0] = 30.0 * step
        tail.row(step, 0, payload(layout, step))
        assert (tail.problem is not None) == (step in (2, 3))
    segments = read_tail(tmp_path)
    assert [s.fault for s in segments] == [None, None] and not tail.holds(7)
    assert [b.steps.tolist() for s in segments for b in s.blocks] == [[0, 1], [4, 5, 6, 7]]
    tail.close()


def test_frame_is_small(tmp_path: Path) -> None:
    """Oracle: closed form. A frame adds 25 bytes to its payload, whatever is in it."""
    rng = random.Random(0)
    layout = Layout(0, (Segment("a", ("v",), tuple(f"m{i}" for i in range(300)), 0),))
    tail = TailWriter(tmp_path, 0, 0)
    tail.layout(layout)
    tail.row(0, 0, rng.randbytes(1200))
    (path,) = tmp_path.iterdir()
    first = path.stat().st_size
    tail.row(1, 0, rng.randbytes(1200))
    assert path.stat().st_size - first == 25 + 1200
    tail.close()
