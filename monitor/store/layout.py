"""Names of files in a run folder, and what may be in run.json. The only place that knows either.

    run.json                            status, versions, facts, columns, series, drops, overhead, warnings
    rank0/tail/<attempt>-<step>.tail    crash-safe rows not yet in a part; framed, check-summed
    rank0/live/<attempt>-<first>-<last>.parquet      young parts, replaced by larger ones
    rank0/series/<attempt>-<first>-<last>.parquet    large parts, never replaced: a glob of them counts nothing twice
    rank0/summary/<attempt>-<first>-<last>.parquet   per series of the large part of the same name
    rank0/findings.parquet              stored findings, with the hash of the rule set and the state of the engine
    rank0/tables/<name>-<attempt>-<step>.parquet     vectors: spectra, per-sample scores, pathways
    rank1/tail/<attempt>-<step>.tail    of another process, where parameters are sharded: rows not yet joined (`ranks`)

Values travel tail → live → series, and are in the next place before they leave the last: whoever lists the folders in
that order misses none. Names of metrics and modules are data and never become names of files. A name ending in ``.tmp``
is a file that is being written, or was when its process died.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from monitor.errors import RunFormatError, UsageError

SCHEMA = 1
RUN_JSON = "run.json"
RANK = "rank0"  # all but the tails of other processes
TAIL, LIVE, SERIES, SUMMARY, TABLES = "tail", "live", "series", "summary", "tables"
FINDINGS = "findings.parquet"

_PART = re.compile(r"(\d{1,18})-(\d{1,18})-(\d{1,18})\.parquet\Z", re.ASCII)
_TAIL = re.compile(r"(\d{1,18})-(\d{1,18})\.tail\Z", re.ASCII)
_TABLE = re.compile(r"([a-z][a-z0-9_]*)-(\d{1,18})-(\d{1,18})\.parquet\Z", re.ASCII)
_LARGEST = 256 << 20  # bytes of a run.json that is worth parsing; a run of 100,000 series needs 10 MB


def rank_name(rank: int) -> str:
    """Name of the folder of the process with this rank."""
    return f"rank{rank}"


def part_name(attempt: int, first: int, last: int) -> str:
    """Name of the part that holds steps ``first`` to ``last`` of ``attempt``."""
    return f"{attempt}-{first:09d}-{last:09d}.parquet"


def parse_part(name: str) -> tuple[int, int, int] | None:
    """``(attempt, first, last)`` of a part's file name, or None if ``name`` is not one."""
    m = _PART.match(name)
    if m is None:
        return None
    attempt, first, last = map(int, m.groups())
    return (attempt, first, last) if first <= last else None


def tail_name(attempt: int, step: int) -> str:
    """Name of the tail segment of ``attempt`` whose rows begin at ``step``."""
    return f"{attempt}-{step:09d}.tail"


def parse_tail(name: str) -> tuple[int, int] | None:
    """``(attempt, step)`` of a tail segment's file name, or None if ``name`` is not one."""
    m = _TAIL.match(name)
    return (int(m[1]), int(m[2])) if m else None


def table_name(name: str, attempt: int, step: int) -> str:
    """Name of the file of the table ``name`` recorded at ``step``.

    Raises:
        UsageError: if ``name`` is not snake_case, the only kind of name that becomes part of a file's name.
    """
    file = f"{name}-{attempt}-{step:09d}.parquet"
    if parse_table(file) is None:
        raise UsageError(f"table {name!r} of step {step}: expected a snake_case name and a step of at least 0")
    return file


def parse_table(file: str) -> tuple[str, int, int] | None:
    """``(name, attempt, step)`` of a table's file name, or None if ``file`` is not one."""
    m = _TABLE.match(file)
    return (m[1], int(m[2]), int(m[3])) if m else None


def now() -> str:
    """The time, ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def new_info(script: str, process: dict[str, Any]) -> dict[str, Any]:
    """The run.json of a run that begins now, without an attempt yet.

    Keys: ``schema`` · ``status`` (running, finished, failed, interrupted, detached; an attempt that was resumed after
    its process vanished: died) · ``script`` · ``created`` and ``ended`` (ISO 8601) · ``process`` that writes (host,
    pid, started) · ``attempts`` · ``versions`` · ``facts`` · ``columns`` (``metric.column`` -> unit, source, …) ·
    ``drops`` (what -> how much) · ``overhead`` · ``absent`` (what could not be recorded, and why) · ``warnings`` ·
    ``series`` (place in the list = id in the parts; metric, column, module).
    """
    return {
        "schema": SCHEMA,
        "status": "running",
        "script": script,
        "created": now(),
        "ended": None,
        "process": process,
        "attempts": [],
        "versions": {},
        "facts": {},
        "columns": {},
        "drops": {},
        "overhead": {},
        "absent": [],
        "warnings": [],
        "series": [],
    }


# What run.json must look like: a type, or None; [every element]; (each element); {key: value}, "key?" where it may be
# missing. What the library itself looks into is spelled out, so that no reader of a hostile file needs to check again.
_NAMED = [{"name": str}]
_SHAPE: dict[str, Any] = {
    "schema": int,
    "status": str,
    "script": str,
    "created": str,
    "ended": str | None,
    "process": {"host": str, "pid": int, "started": int | None},
    "attempts": [{"start_step": int, "started": str, "ended": str | None, "status": str, "error": str | None}],
    "versions": {},
    "facts": {"modules?": _NAMED, "parameters?": _NAMED, "optimizers?": [{}], "precision?": {}},
    "columns": {},
    "drops": {},
    "overhead": {},
    "absent": [{"what": str, "why": str}],
    "warnings": [str],
    "series": [(str, str, str)],
}


def _fault(value: Any, shape: Any, where: str) -> str | None:
    """What is wrong with ``value``, in words, or None."""
    kind: Any = type(shape) if isinstance(shape, dict | list) else list if isinstance(shape, tuple) else shape
    received = type(value)
    if not issubclass(received, kind) or received is bool:
        return f"{where} is {received.__name__}, expected {getattr(kind, '__name__', kind)}"
    if received is int and not -(2**63) <= value < 2**63:
        return f"{where} does not fit into 64 bits"
    inner: Iterator[tuple[Any, Any, str]] = iter(())
    if isinstance(shape, dict):
        missing = [k for k in shape if not k.endswith("?") and k not in value]
        if missing:
            return f"{where} lacks {missing[0]!r}"
        keys = ((k.removesuffix("?"), s) for k, s in shape.items())
        inner = ((value[k], s, f"{where}.{k}") for k, s in keys if k in value)
    elif isinstance(shape, list):
        if not isinstance(shape[0], tuple) or not _regular(value, shape[0]):
            inner = ((v, shape[0], f"{where}[{i}]") for i, v in enumerate(value))
    elif isinstance(shape, tuple):
        if len(value) != len(shape):
            return f"{where} has {len(value)} elements, expected {len(shape)}"
        inner = ((v, s, f"{where}[{i}]") for i, (v, s) in enumerate(zip(value, shape, strict=True)))
    for v, s, w in inner:
        if fault := _fault(v, s, w):
            return fault
    return None


def _regular(rows: list[Any], shape: tuple[type, ...]) -> bool:
    """Whether all ``rows`` have this shape, asked at once: of very many tensors there are 100,000 series."""
    return all(type(r) is list and len(r) == len(shape) for r in rows) and all(
        set(map(type, column)) == {kind} for column, kind in zip(zip(*rows, strict=True), shape, strict=False)
    )


def read_info(folder: Path) -> dict[str, Any]:
    """The run.json of ``folder``, checked.

    Args:
        folder: a run folder.

    Returns:
        What `new_info` describes; every key is there and has the right type.

    Raises:
        RunFormatError: if it is missing, not a plain file of the folder, not JSON, of a newer schema or misshapen.
    """
    path = folder / RUN_JSON
    if not path.is_file() or not inside(folder, path):
        raise RunFormatError(f"{str(folder)!r}: no {RUN_JSON} in it, so not a run folder")
    try:
        if path.stat().st_size > _LARGEST:
            raise RunFormatError(f"{str(path)!r}: larger than {_LARGEST >> 20} MiB, not written by this library")
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise RunFormatError(f"{str(path)!r}: cannot be read: {type(e).__name__}: {e}") from e
    schema = data.get("schema") if isinstance(data, dict) else None
    if type(schema) is not int or schema < 1:
        raise RunFormatError(
            f"{str(path)!r}: schema is {schema!r:.40}, expected 1 to {SCHEMA}: not a run of this library"
        )
    if schema > SCHEMA:
        raise RunFormatError(
            f"{str(path)!r}: schema {schema:.40g}, this version reads up to {SCHEMA}: upgrade the library"
        )
    if fault := _fault(data, _SHAPE, "it"):
        raise RunFormatError(f"{str(path)!r}: {fault}")
    return data


def write_info(folder: Path, info: dict[str, Any]) -> None:
    """Replace the run.json of ``folder`` at once.

    Raises:
        OSError: if it cannot be written; the old one stays.
    """
    with replacing(folder / RUN_JSON) as temp:
        temp.write_text(json.dumps(info, separators=(",", ":")) + "\n", encoding="ascii")


def plain(value: Any) -> Any:
    """``value`` as strict JSON holds it: NumPy numbers as numbers, NaN as ``"NaN"``, what it cannot hold as text."""

    def other(o: Any) -> Any:
        return o.item() if hasattr(o, "item") else str(o)

    return json.loads(json.dumps(value, default=other), parse_constant=str)


@contextmanager
def replacing(path: Path, sync: bool = False) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its name when the body ends, and is removed if the body fails.

    Args:
        path: the final name.
        sync: wait until the bytes are on the disk, so that not even a power cut leaves a torn file.
    """
    temp = path.with_name(f".{path.name}.tmp")  # neither a pattern for Parquet nor a data set of the folder finds it
    try:
        yield temp
        if sync:
            _settle(temp)
        temp.replace(path)
        if sync:
            _settle(path.parent)
    except BaseException:
        with suppress(OSError):
            temp.unlink()
        raise


def _settle(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def inside(folder: Path, path: Path) -> bool:
    """True if ``path``, with every link followed, lies in ``folder``."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def names(folder: Path, room: str, rank: int = 0) -> list[str]:
    """Names of the plain files in ``folder/rank<rank>/room``, sorted; links and anything outside are left out.

    Args:
        folder: a run folder.
        room: `TAIL`, `LIVE`, `SERIES`, `SUMMARY` or `TABLES`.
        rank: of the process that wrote them.
    """
    place = folder / rank_name(rank) / room
    if not inside(folder, place):
        return []
    try:
        with os.scandir(place) as entries:
            return sorted(e.name for e in entries if e.is_file(follow_symlinks=False))
    except (FileNotFoundError, NotADirectoryError):
        return []
