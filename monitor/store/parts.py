"""Long Parquet parts: series id, step, value; sorted by series, then step; written once and never modified.

Sorted by series, one curve is a handful of row groups; byte-stream-split values and delta-coded steps take about 3.2
bytes a value. What was not recorded is simply not there; a recorded NaN is a row. Everything here goes through buffers
instead of pyarrow's NumPy conversions, which would import pandas into the training process.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from monitor.block import ColumnBlock, Steps
from monitor.store.layout import LIVE, RANK, names, parse_part, replacing

Ids = npt.NDArray[np.int32]
Values = npt.NDArray[np.float32]
#: What a table is made of: columns of one length, numbers (what is masked is null) or strings.
Vectors = Mapping[str, npt.NDArray[Any] | Sequence[str]]

ROW_GROUP = 1 << 17
_BATCH = 1 << 14  # rows that a merge holds of each part
_LISTINGS = 100  # of a folder in which parts vanish faster than they can be opened
_SEAL = b"monitor.part"

#: Columns of a part.
PART = pa.schema(
    [
        pa.field("series", pa.int32(), nullable=False),
        pa.field("step", pa.int64(), nullable=False),
        pa.field("value", pa.float32(), nullable=False),
    ]
)

_ENCODINGS = {"step": "DELTA_BINARY_PACKED", "value": "BYTE_STREAM_SPLIT"}

#: What a damaged or foreign file makes us raise. A missing file is an OSError too: ask for that first.
UNREADABLE = (OSError, pa.ArrowException, ValueError, KeyError, TypeError)


class Points(NamedTuple):
    """Recorded values, one row each: ``series`` int32, ``steps`` int64 and ``values`` float32, all ``(n,)``."""

    series: Ids
    steps: Steps
    values: Values

    def where(self, mask: npt.NDArray[np.bool_] | slice | npt.NDArray[np.intp]) -> Points:
        """The rows that ``mask`` selects."""
        return Points(self.series[mask], self.steps[mask], self.values[mask])


def joined(several: Sequence[Points]) -> Points:
    """One after the other."""
    if not several:
        return Points(np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.float32))
    return Points(*(np.concatenate(c) for c in zip(*several, strict=True)))


class Names:
    """The series dictionary: ``(metric, column, module)`` <-> id, the place in the list."""

    def __init__(self, triples: Iterable[Sequence[str]] = ()) -> None:
        self.triples: list[tuple[str, str, str]] = [(t[0], t[1], t[2]) for t in triples]
        self._ids: dict[tuple[str, str], dict[str, int]] = {}
        for i, (metric, column, module) in enumerate(self.triples):
            self._ids.setdefault((metric, column), {})[module] = i

    def __len__(self) -> int:
        return len(self.triples)

    def columns(self) -> Iterator[tuple[str, str]]:
        """Every recorded ``(metric, column)``, in the order of its first value."""
        return iter(self._ids)

    def of(self, metric: str, column: str) -> dict[str, int]:
        """Module -> id of one column, in the order of their first values; empty if nothing was recorded."""
        return self._ids.get((metric, column), {})

    def add(self, metric: str, column: str, modules: Iterable[str]) -> Ids:
        """Ids of the series of ``modules``, new ones where there were none."""
        ids = self._ids.setdefault((metric, column), {})
        for m in modules:
            if m not in ids:
                ids[m] = len(self.triples)
                self.triples.append((metric, column, m))
        return np.array([ids[m] for m in modules], dtype=np.int32)


def gather(blocks: Iterable[ColumnBlock], names: Names) -> Points:
    """The recorded values of ``blocks`` as one part holds them.

    Args:
        blocks: in order of steps.
        names: gets the series that have a first value here.

    Returns:
        Sorted by series, then step. Values beyond float32 become infinite.
    """
    together: dict[tuple[str, str, tuple[str, ...]], list[ColumnBlock]] = {}
    for b in blocks:
        together.setdefault((b.metric, b.column, b.modules), []).append(b)
    found: list[Points] = []
    for (metric, column, modules), same in together.items():
        steps = np.concatenate([b.steps for b in same])
        has = np.concatenate([b.has for b in same]).T
        recorded = np.flatnonzero(has.any(axis=1))
        if not len(recorded):
            continue
        ids = names.add(metric, column, [modules[i] for i in recorded])
        has = has[recorded]
        with np.errstate(over="ignore"):
            values = np.concatenate([b.values for b in same]).T[recorded][has].astype(np.float32)
        found.append(
            Points(np.repeat(ids, has.sum(axis=1)), np.broadcast_to(steps, has.shape)[has], values),
        )
    points = joined(found)
    up = np.diff(points.series)
    if np.any((up < 0) | ((up == 0) & (np.diff(points.steps) < 0))):
        points = points.where(np.lexsort((points.steps, points.series)))
    return points


def write_part(path: Path, chunks: Iterable[Points], steps: int, sync: bool = False) -> None:
    """Write a part under a temporary name, then rename it.

    Args:
        path: the final name.
        chunks: rows in order of series, then step.
        steps: number of recorded steps in it.
        sync: wait for the disk.

    Raises:
        OSError: if it cannot be written; nothing is left behind.
    """
    groups: list[tuple[int, int, int]] = []

    def tables() -> Iterator[pa.Table]:
        for p in _regrouped(chunks):
            groups.append((int(p.series[0]), int(p.series[-1]), len(p.series)))
            yield table_of(p)

    with replacing(path, sync) as temp:
        seal = {"steps": steps, "groups": groups}  # complete once the last group is written
        write_table(temp, tables(), PART, _ENCODINGS, lambda: {_SEAL: _sealed(seal)})


def write_table(
    path: Path,
    tables: Iterable[pa.Table],
    schema: pa.Schema,
    encodings: Mapping[str, str] | None = None,
    footer: Callable[[], dict[bytes, bytes]] | None = None,
) -> None:
    """Write ``tables``, a row group each, as this library encodes all its Parquet.

    Args:
        path: where; not renamed.
        tables: of ``schema``.
        schema: columns, and what else the file should know.
        encodings: of columns that are not to have the usual one.
        footer: asked after the last table for more that the file should know.

    Raises:
        OSError: if it cannot be written.
    """
    # pyarrow's annotations know only the yes or no of this argument
    dictionary: Any = [f.name for f in schema if f.name == "series" or pa.types.is_string(f.type)]
    # through a file of Python's own, whose errors keep their errno
    with (
        path.open("wb") as file,
        pq.ParquetWriter(
            file,
            schema,
            compression="zstd",
            use_dictionary=dictionary,
            column_encoding=encodings and dict(encodings),
            write_statistics=True,
            write_page_checksum=True,
        ) as out,
    ):
        for table in tables:
            out.write_table(table, row_group_size=max(1, table.num_rows))
        if footer:
            out.add_key_value_metadata(footer())


def _sealed(index: dict[str, Any]) -> bytes:
    body = json.dumps(index, separators=(",", ":")).encode()
    return b"%08x" % zlib.crc32(body) + body


def _unsealed(sealed: bytes) -> dict[str, Any]:
    # Parquet has no checksum over its footer, and a wrong index would hide values without a word
    if sealed[:8] != b"%08x" % zlib.crc32(sealed[8:]):
        raise ValueError("its index is damaged")
    return json.loads(sealed[8:])


def _regrouped(chunks: Iterable[Points]) -> Iterator[Points]:
    """``chunks`` joined and cut so that each but the last has `ROW_GROUP` rows or somewhat more."""
    held: list[Points] = []
    rows = 0
    for chunk in chunks:
        held.append(chunk)
        rows += len(chunk.series)
        if rows >= 2 * ROW_GROUP:
            whole = joined(held)
            cuts = range(ROW_GROUP, rows - ROW_GROUP + 1, ROW_GROUP)
            edges = [0, *cuts]
            for a, b in pairwise(edges):
                yield whole.where(slice(a, b))
            held = [whole.where(slice(edges[-1], None))]
            rows -= edges[-1]
    if rows:
        yield joined(held)


def arrow(a: npt.NDArray[Any]) -> pa.Array:
    """``a``, numbers or truths, as an Arrow array; what is masked is null."""
    data = np.packbits(a, bitorder="little") if a.dtype == np.bool_ else np.ascontiguousarray(np.ma.getdata(a))
    mask = np.ma.getmask(a)
    valid = None if mask is np.ma.nomask else pa.py_buffer(np.packbits(~mask, bitorder="little"))
    return pa.Array.from_buffers(pa.from_numpy_dtype(a.dtype), len(a), [valid, pa.py_buffer(data)])


def utf8(strings: Iterable[str]) -> list[str]:
    """``strings`` with a question mark for what UTF-8 cannot hold: the half of a pair that a hostile name may be."""
    return [s.encode("utf-8", "replace").decode() for s in strings]


def texts(strings: Iterable[str]) -> pa.Array:
    """``strings`` as an Arrow array; see `utf8`."""
    encoded = [s.encode() for s in utf8(strings)]
    ends = np.cumsum([0, *map(len, encoded)]).astype(np.int32)
    return pa.Array.from_buffers(pa.string(), len(encoded), [None, pa.py_buffer(ends), pa.py_buffer(b"".join(encoded))])


def flat(column: pa.ChunkedArray | pa.Array) -> npt.NDArray[np.generic]:
    """The values of a numeric column without nulls.

    Raises:
        ValueError: if there are nulls.
    """
    if column.null_count:
        raise ValueError("holds nulls")
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    dtype = np.dtype(column.type.to_pandas_dtype())
    found = [np.frombuffer(c.buffers()[1], dtype=dtype)[c.offset : c.offset + len(c)] for c in chunks if len(c)]
    if len(found) == 1:
        return found[0]
    return np.concatenate(found) if found else np.zeros(0, dtype)


def table_of(points: Points) -> pa.Table:
    """``points`` as Arrow has them, without a copy."""
    return pa.Table.from_arrays([arrow(c) for c in points], schema=PART)


def _points(table: pa.Table | pa.RecordBatch) -> Points:
    series, steps, values = (flat(table.column(name)) for name in PART.names)
    return Points(series, steps, values)  # pyright: ignore[reportArgumentType]  # types were checked when it was opened


@dataclass(frozen=True, eq=False)
class Part:
    """A part on disk, its footer read.

    Attributes:
        path: the file.
        attempt, first, last: what it covers, from its name.
        rows: number of values.
        steps: number of recorded steps.
        stamp: size and time of the file.
    """

    path: Path
    attempt: int
    first: int
    last: int
    rows: int
    steps: int
    stamp: tuple[int, int]
    _file: pa.NativeFile | None
    _meta: pq.FileMetaData
    _groups: npt.NDArray[np.int64]  # (row group, 3): lowest id, highest id, rows

    @staticmethod
    def open(path: Path, held: bool = False) -> Part:
        """Read the footer of ``path``.

        Args:
            path: the file.
            held: keep it open as long as the part lives, so that it can be read even if it was removed meanwhile.

        Raises:
            FileNotFoundError: if it is gone.
            an error of `UNREADABLE`: if it is no part.
        """
        name = parse_part(path.name)
        if name is None:
            raise ValueError("its name is not that of a part")
        kept, stamp = pa.OSFile(str(path)) if held else None, stamp_of(path)
        with pq.ParquetFile(kept or path) as file:
            meta, schema = file.metadata, file.schema_arrow
        seal = (meta.metadata or {}).get(_SEAL)
        if not schema.equals(PART) or seal is None:
            raise ValueError(f"has columns {', '.join(schema.names)!r:.80}, expected a part that this library wrote")
        index = _unsealed(seal)
        groups = np.array(index["groups"], dtype=np.int64).reshape(-1, 3)
        if len(groups) != meta.num_row_groups:
            raise ValueError(f"has {meta.num_row_groups} row groups, expected {len(groups)}")
        return Part(path, *name, int(groups[:, 2].sum()), int(index["steps"]), stamp, kept, meta, groups)

    def covers(self, other: Part) -> bool:
        """True if everything in ``other`` is in this part too."""
        return self.attempt == other.attempt and self.first <= other.first and other.last <= self.last

    def read(self, ids: Ids | None = None) -> Points:
        """The values of the series ``ids`` (all without), in the order of the file.

        Raises:
            an error of `UNREADABLE`: if it is damaged.
        """
        groups = np.arange(len(self._groups))
        if ids is not None:
            low, high = (ids.min(), ids.max()) if len(ids) else (1, 0)
            groups = np.flatnonzero((self._groups[:, 1] >= low) & (self._groups[:, 0] <= high))
        if not len(groups):
            return joined(())
        with self._open() as file:
            points = _points(file.read_row_groups(groups.tolist(), columns=PART.names, use_threads=False))
        if len(points.series) != self._groups[groups, 2].sum():
            raise ValueError("has lost rows")
        return points if ids is None else points.where(np.isin(points.series, ids))

    def _open(self) -> pq.ParquetFile:
        return pq.ParquetFile(self._file or self.path, metadata=self._meta, page_checksum_verification=True)

    def batches(self) -> Iterator[Points]:
        """All values, some thousand at a time.

        Raises:
            an error of `UNREADABLE`: if it is damaged.
        """
        with self._open() as file:
            for batch in file.iter_batches(_BATCH, columns=PART.names, use_threads=False):
                yield _points(batch)


def stamp_of(path: Path) -> tuple[int, int]:
    """Size and time of a file.

    Raises:
        FileNotFoundError: if it is gone.
    """
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def open_parts(folder: Path, room: str, before: Iterable[Part] = ()) -> tuple[list[Part], list[str]]:
    """The parts that stand in a room of a run folder.

    Args:
        folder: a run folder.
        room: `LIVE` or `SERIES`. Live parts are held open, so that they can be read after they were replaced.
        before: parts that are open already; those that still stand there are given back.

    Returns:
        The readable ones, and what is wrong with each of the others.
    """
    found: dict[str, Part] = {}
    faults: dict[str, str] = {}
    known = {p.path: p for p in before}
    for _ in range(_LISTINGS):
        vanished = False
        for name in names(folder, room):
            if name in found or name in faults or name.endswith(".tmp"):
                continue
            path = folder / RANK / room / name
            try:
                same = path in known and known[path].stamp == stamp_of(path)
                found[name] = known[path] if same else Part.open(path, held=room == LIVE)
            except FileNotFoundError:
                vanished = True
            except UNREADABLE as e:
                faults[name] = f"{room}/{name} cannot be read: {e}"
        if not vanished:  # or what replaced it is in the next listing; what is held already stays valid
            break
    return list(found.values()), list(faults.values())


def merge(parts: Iterable[Part]) -> Iterator[Points]:
    """The values of several parts of one attempt, sorted by series, then step, in little memory.

    Args:
        parts: with ranges that do not overlap.

    Yields:
        Chunks that hold each of their series whole.

    Raises:
        an error of `UNREADABLE`: if one is damaged.
    """
    # in order of steps, so that a stable sort by series leaves the steps of each series in order
    streams = [p.batches() for p in sorted(parts, key=lambda p: p.first)]
    held: list[list[Points]] = [[] for _ in streams]
    running = set(range(len(streams)))
    bound = -1  # series up to here may go on in a stream that has not ended
    while running:
        for i in [i for i in running if not held[i] or held[i][-1].series[-1] <= bound]:
            batch = next(streams[i], None)
            if batch is None:
                running.discard(i)
            elif len(batch.series):
                held[i].append(batch)
        if any(not held[i] for i in running):
            continue
        bound = min((int(held[i][-1].series[-1]) for i in running), default=np.iinfo(np.int32).max)
        ready: list[Points] = []
        for i, batches in enumerate(held):
            if batches and (batches[0].series[0] < bound or not running):
                mine = joined(batches)
                cut = len(mine.series) if not running else int(np.searchsorted(mine.series, bound))
                ready.append(mine.where(slice(0, cut)))
                held[i] = [mine.where(slice(cut, None))] if cut < len(mine.series) else []
        if ready:
            points = joined(ready)
            yield points.where(np.argsort(points.series, kind="stable"))


def visible(parts: Iterable[Part]) -> list[Part]:
    """The cover rule: ``parts`` without those whose range lies in another's; in order of attempt and step.

    Args:
        parts: at equal ranges the earlier one wins.
    """
    found: list[Part] = []
    for p in sorted(parts, key=lambda p: p.first - p.last):  # widest first; sorted() keeps equals in order
        if not any(q.covers(p) for q in found):
            found.append(p)
    return sorted(found, key=lambda p: (p.attempt, p.first))
