r"""The crash-safe tail: one check-summed frame per step, appended with one system call by the training thread.

A step's row is in the page cache before the next step begins, so a killed process loses at most the row it was writing.
Rows leave the tail once a part on disk holds what was computed from them.

    frame    magic "\xb5TF1" · crc32 of the rest (u32) · length of the body (u32) · kind (u8) · body      little-endian
    layout   kind 1: JSON of `Layout.to_json`
    row      kind 2: step (i64) · number of the layout (u32) · float32 payload

A segment begins with the layout its rows follow. A reader stops at the first bad frame: nothing after it can
be trusted.
"""

from __future__ import annotations

import json
import os
import struct
import time
import zlib
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from monitor.block import ColumnBlock, Layout, RawBlock, evaluate
from monitor.metric import Metric
from monitor.store.layout import TAIL, names, parse_tail, rank_name, tail_name

RETRY_SECONDS = 60.0  # after a failed write
_MAGIC = b"\xb5TF1"
_HEAD = struct.Struct("<4sIIB")  # magic, crc32, length, kind
_META = struct.Struct("<IB")  # what the crc32 covers of the head
_ROW = struct.Struct("<IBqI")  # the same, and what stands before a row's payload
_BEFORE_PAYLOAD = _ROW.size - _META.size
_LAYOUT_KIND, _ROW_KIND = 1, 2


class TailWriter:
    """Appends rows to the tail. A failed write raises nothing; it sets `problem`.

    Everything but `drop` belongs to the training thread.

    Args:
        folder: where the segments stand.
        attempt: number of the attempt, part of their names.
        first_step: step of the first row to come.
    """

    def __init__(self, folder: Path, attempt: int, first_step: int) -> None:
        #: why the tail is not being written, in words; None while it is
        self.problem: str | None = None
        self._folder, self._attempt, self._next = folder, attempt, first_step
        self._pid = os.getpid()
        self._fd = -1
        self._good = 0  # bytes of whole frames in the open segment
        self._path = folder
        self._last: int | None = None  # step of the last row in the open segment
        self._latest: int | None = None  # and of all rows
        self._missed = False
        self._head = b""  # the frame of the current layout
        self._retry_at = 0.0
        # written by the training thread, emptied by the writer thread: appending to and popping from a deque are atomic
        self._closed: deque[tuple[int, Path]] = deque()

    def layout(self, layout: Layout) -> None:
        """Rows from now on follow ``layout``."""
        body = json.dumps(layout.to_json(), separators=(",", ":")).encode()
        meta = _META.pack(len(body), _LAYOUT_KIND)
        self._head = b"".join((_MAGIC, _crc(meta, body), meta, body))
        if self._fd >= 0 and os.getpid() == self._pid:
            self._write(self._head)

    def row(self, step: int, layout_number: int, payload: bytes) -> None:
        """Append the row of ``step``: one write, some microseconds.

        Args:
            step: must grow from row to row.
            layout_number: number of the layout given last.
            payload: ``layout.size`` float32, little-endian.
        """
        if os.getpid() != self._pid:  # a forked worker shares the descriptor; what it computes is not this run's
            return
        meta = _ROW.pack(_BEFORE_PAYLOAD + len(payload), _ROW_KIND, step, layout_number)
        frame = b"".join((_MAGIC, _crc(meta, payload), meta, payload))
        if (self._fd >= 0 or self._open()) and self._write(frame):
            self._last = self._latest = step
        else:
            self._missed = True

    def rotate(self, next_step: int) -> None:
        """Begin a new segment: the rows so far are on their way into a part.

        Args:
            next_step: step of the first row to come, which names the segment.
        """
        if os.getpid() == self._pid:
            self._close()
            self._next = next_step

    def holds(self, step: int) -> bool:
        """True if every row up to ``step`` was written."""
        return not self._missed and self._latest is not None and self._latest >= step

    def close(self) -> None:
        """Write no more rows."""
        if os.getpid() == self._pid:
            self._close()

    def drop(self, last: int) -> None:
        """Remove the closed segments whose rows all stand in parts. Called by the writer thread.

        Args:
            last: the last step that parts hold.

        Raises:
            OSError: if a segment cannot be removed.
        """
        while self._closed and self._closed[0][0] <= last:
            _, path = self._closed.popleft()
            path.unlink(missing_ok=True)

    def _open(self) -> bool:
        if time.monotonic() < self._retry_at:
            return False
        self._path = self._folder / tail_name(self._attempt, self._next)
        try:
            self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        except OSError as e:
            return self._stop(e)
        self._good, self._last = 0, None
        return self._write(self._head)

    def _write(self, frame: bytes) -> bool:
        try:
            written = os.write(self._fd, frame)
            if written != len(frame):
                raise OSError(f"only {written} of {len(frame)} bytes could be written, the disk may be full")
        except OSError as e:
            return self._stop(e)
        self._good += written
        self.problem = None
        return True

    def _stop(self, e: OSError) -> bool:
        # until the next try the rows are held by the writer's buffer alone; a later segment makes a clean start
        self.problem = f"{e.strerror or e}"
        self._retry_at = time.monotonic() + RETRY_SECONDS
        if self._fd >= 0:
            with suppress(OSError):  # or the torn frame stays; a reader stops there and says so
                os.ftruncate(self._fd, self._good)
            self._close()
        return False

    def _close(self) -> None:
        if self._fd < 0:
            return
        os.close(self._fd)
        self._fd = -1
        if self._last is None:
            with suppress(OSError):
                self._path.unlink()
        else:
            self._closed.append((self._last, self._path))
            self._next = self._last + 1


def _crc(meta: bytes, body: bytes) -> bytes:
    return zlib.crc32(body, zlib.crc32(meta)).to_bytes(4, "little")


@dataclass(frozen=True, eq=False)
class Segment:
    """What could be read of one segment of the tail.

    Attributes:
        path, attempt, first: the file and what its name says.
        blocks: the rows, cut where the layout changes; steps strictly increasing.
        fault: why reading stopped before the end, in words; None if it did not.
        cut: True if the file ends within its last frame, as after a crash, or while a row is being written.
    """

    path: Path
    attempt: int
    first: int
    blocks: list[RawBlock]
    fault: str | None
    cut: bool


def read_tail(folder: Path, rank: int = 0) -> list[Segment]:
    """Every segment of a process's tail, in order of attempt and step; one that vanishes meanwhile is left out."""
    found = []
    for name in names(folder, TAIL, rank):
        if (parsed := parse_tail(name)) is None:
            continue
        path = folder / rank_name(rank) / TAIL / name
        try:
            rows = read_rows(path.read_bytes())
        except FileNotFoundError:
            continue
        except OSError as e:
            rows = [], f"cannot be read: {e}", False
        blocks, fault, cut = rows
        fault = fault and f"{TAIL}/{name}: {fault}; {sum(len(b.steps) for b in blocks):,} steps of it were read"
        found.append(Segment(path, *parsed, blocks, fault, cut))
    return sorted(found, key=lambda s: (s.attempt, s.first))


def read_rows(data: bytes) -> tuple[list[RawBlock], str | None, bool]:
    """The rows in the bytes of a tail segment, up to the first bad frame.

    Args:
        data: content of the file, possibly torn or foreign; never the cause of an exception.

    Returns:
        ``blocks``, ``fault`` and ``cut`` of `Segment`.
    """
    view = memoryview(data)
    layouts: dict[int, Layout] = {}
    runs: list[tuple[Layout, list[int], list[memoryview]]] = []
    at, fault, cut = 0, None, False
    while at < len(data) and fault is None:
        head = view[at : at + _HEAD.size]
        magic, crc, length, kind = _HEAD.unpack(head) if len(head) == _HEAD.size else (head[:4], 0, len(data), 0)
        end = at + _HEAD.size + length
        body = view[at + _HEAD.size : end]
        if not _MAGIC.startswith(bytes(magic)):
            fault = "bad magic number"
        elif end > len(data):
            fault, cut = "cut off within the last frame", True
        elif zlib.crc32(view[at + 8 : end]) != crc:
            fault = "bad checksum"
        elif kind == _LAYOUT_KIND:
            if (layout := _layout(bytes(body))) is None:
                fault = "a layout that makes no sense"
            else:
                layouts[layout.number] = layout
        elif kind == _ROW_KIND and length >= _BEFORE_PAYLOAD:
            _, _, step, number = _ROW.unpack(view[at + 8 : at + 8 + _ROW.size])
            layout, payload = layouts.get(number), body[_BEFORE_PAYLOAD:]
            if layout is None or len(payload) != 4 * layout.size:
                fault = f"a row of {len(payload)} bytes that no layout describes"
            elif runs and step <= runs[-1][1][-1]:
                fault = f"step {step} after step {runs[-1][1][-1]}"
            else:
                if not runs or runs[-1][0] is not layout:
                    runs.append((layout, [], []))
                runs[-1][1].append(step)
                runs[-1][2].append(payload)
        else:
            fault = f"a frame of unknown kind {kind}"
        if fault:
            fault += f" at byte {at:,} of {len(data):,}"
        at = end
    blocks = [
        RawBlock(
            layout,
            np.array(steps, dtype=np.int64),
            np.frombuffer(b"".join(rows), dtype="<f4").reshape(len(steps), layout.size),
        )
        for layout, steps, rows in runs
    ]
    return blocks, fault, cut


def columns(blocks: Iterable[RawBlock], metrics: Iterable[Metric], after: int) -> tuple[list[ColumnBlock], list[str]]:
    """The columns of one attempt's rows.

    Args:
        blocks: in order of steps.
        metrics: what to compute; derived ones are skipped.
        after: rows up to this step are left out, because parts hold them.

    Returns:
        The columns, and what is wrong with each metric that could not be computed.
    """
    fresh: list[RawBlock] = []
    for b in blocks:
        new = b.steps > after
        if new.any():
            fresh.append(RawBlock(b.layout, b.steps[new], b.rows[new]))
            after = int(b.steps[-1])
    metrics = list(metrics)
    found: list[ColumnBlock] = []
    faults: dict[str, None] = {}
    for layout, group in groupby(fresh, key=lambda b: b.layout):
        same = list(group)
        raw = RawBlock(layout, np.concatenate([b.steps for b in same]), np.concatenate([b.rows for b in same]))
        found += evaluate(raw, metrics, lambda _, error: faults.update({str(error): None}))
    return found, list(faults)


def _layout(body: bytes) -> Layout | None:
    """The layout in a frame, or None if it is none or its segments do not fill a row exactly."""
    try:
        layout = Layout.from_json(json.loads(body))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return None
    at = 0
    for s in layout.segments:
        if s.offset != at or not s.stats or len(set(s.stats)) < len(s.stats) or len(set(s.modules)) < len(s.modules):
            return None
        at += s.size
    return layout
