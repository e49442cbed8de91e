"""Writes a run folder: rows to the tail, columns to parts, parts to larger parts, everything else to run.json.

Nothing here may disturb a training. A disk that is full or gone makes `RunWriter.problem` say so and values be counted
as lost, never an exception; a forked child, which inherits all of this, writes nothing.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from monitor.block import ColumnBlock
from monitor.errors import MetricError, RunFormatError, UsageError
from monitor.metric import load_metrics
from monitor.store import layout
from monitor.store.parts import (
    UNREADABLE,
    Names,
    Part,
    Points,
    Vectors,
    arrow,
    gather,
    merge,
    open_parts,
    texts,
    visible,
    write_part,
    write_table,
)
from monitor.store.process import this_process
from monitor.store.ranks import Others, join, others_of, read_others
from monitor.store.run import Run
from monitor.store.stored import write_findings
from monitor.store.summary import Summaries, joined_summaries, summarise, write_summaries
from monitor.store.tail import RETRY_SECONDS, TailWriter, columns, read_tail

if TYPE_CHECKING:
    from monitor.diagnosis.finding import Finding

FLUSH_STEPS = 1000
FLUSH_SECONDS = 30.0
FLUSH_VALUES = 1 << 20  # so that the buffer of a model with very many tensors stays small
KEEP_VALUES = 1 << 22  # what is held while the disk refuses, before it is given up
FAN = 16  # live parts of one size that are merged into one of the next
LARGE_ROWS = 1 << 23  # a part of this size is worth keeping for good …
LARGE_STEPS = 4096  # … if it also covers enough steps for its summary to be small beside it

Status = Literal["finished", "failed", "interrupted", "detached"]
_OPEN_FIELDS = ("versions", "facts", "columns", "drops", "overhead", "absent", "warnings")


class RunWriter:
    """Writes one attempt of a run. Made by `create`.

    `update` and `problem` may be used from any thread, ``tail`` from the training thread; the rest belongs to one
    writer thread at a time. Only `create` raises on account of the disk.

    Attributes:
        path: the run folder, absolute.
        renamed: True if the folder asked for was occupied and ``path`` is another one.
        attempt: 0, or the number of earlier attempts of a resumed run.
        start_step: step of the first row to come.
        tail: where the training thread writes its rows.
        others: the other processes that record parts of what this one records; None if there are none.
        lost_values: values that could not be written.
        lost_steps: first and last step of them, or None.
    """

    def __init__(self, path: Path, info: dict[str, Any], start_step: int, renamed: bool) -> None:
        self.path, self.renamed, self.start_step = path, renamed, start_step
        self.attempt = len(info["attempts"]) - 1
        self.others: Others | None = None
        self.lost_values = 0
        self.lost_steps: tuple[int, int] | None = None
        self._rank = path / layout.RANK
        self.tail = TailWriter(self._rank / layout.TAIL, self.attempt, start_step)
        self._pid = os.getpid()
        self._info, self._names = info, Names(info["series"])
        self._explained = len(self._names)  # ids that the run.json on disk explains
        self._lock = Lock()  # of run.json, in memory and on disk
        self._problems: dict[str, str] = {}  # what cannot be written -> why
        self._retry_at: dict[str, float] = {}
        self._buffer: list[ColumnBlock] = []
        self._steps = self._values = 0  # in the buffer
        self._flushed = time.monotonic()
        self._levels: list[list[Part]] = [[]]  # this attempt's live parts, the youngest and smallest first
        self._closed = False

    @staticmethod
    def create(folder: Path | str, *, script: str, resume: bool = False, start_step: int | None = None) -> RunWriter:
        """Begin a run, or another attempt of one.

        Args:
            folder: where; an occupied one is never touched, the run then goes to ``folder-2``, ``-3``, ….
            script: what is being run, for the reader.
            resume: append an attempt to the run in ``folder``, if there is one.
            start_step: step of the first row; None for 0, or for the step after the last recorded one.

        Raises:
            OSError: if the folder cannot be made or written.
            RunFormatError: if the folder holds a run that cannot be read.
            UsageError: if another process is writing the run, or ``start_step`` is negative.
        """
        if start_step is not None and start_step < 0:
            raise UsageError(f"start_step is {start_step}, expected at least 0")
        path = Path(folder).absolute()
        if resume and (path / layout.RUN_JSON).exists():
            info, start_step, renamed = *_resumed(path, start_step), False
        else:
            path, renamed = (path, False) if resume else _claimed(path)
            info = layout.new_info(script, this_process())
        start = start_step or 0
        info["attempts"].append(
            {"start_step": start, "started": layout.now(), "ended": None, "status": "running", "error": None}
        )
        for room in (layout.TAIL, layout.LIVE, layout.SERIES, layout.SUMMARY, layout.TABLES):
            place = path / layout.RANK / room
            place.mkdir(parents=True, exist_ok=True)
            if not layout.inside(path, place):
                raise RunFormatError(
                    f"{str(place)!r} leads out of the run folder; remove the link or use another folder"
                )
        layout.write_info(path, info)
        return RunWriter(path, info, start, renamed)

    @property
    def problem(self) -> str | None:
        """Why something is not being written at the moment, in words; None if all is well."""
        return (*self._problems.values(), self.tail.problem)[0]

    def update(self, **fields: Any) -> None:
        """Merge ``fields`` into run.json and rewrite it at once.

        Args:
            fields: ``versions``, ``facts``, ``columns``, ``drops`` and ``overhead`` are mappings and merged key by key;
                ``absent`` is replaced; of ``warnings``, a list, the new ones are appended. What JSON cannot hold is
                written as text.

        Raises:
            UsageError: for any other field; the rest of run.json is the writer's own.
        """
        unknown = [f for f in fields if f not in _OPEN_FIELDS]
        if unknown:
            raise UsageError(f"run.json has no open field {unknown[0]!r}; there are {', '.join(_OPEN_FIELDS)}")
        if os.getpid() != self._pid:
            return
        with self._lock:
            for name, value in layout.plain(fields).items():
                if name == "warnings":
                    self._info[name] += [str(w) for w in value if str(w) not in self._info[name]]
                elif name == "absent":
                    self._info[name] = value
                else:
                    self._info[name] |= value
        self._try("run.json", self._save)

    def append(self, blocks: Sequence[ColumnBlock]) -> None:
        """Take recorded columns; `flush` writes them.

        Args:
            blocks: of the same steps, later than those taken before.
        """
        if self._values > KEEP_VALUES:  # the disk has refused them; one block of very many tensors may be as large
            self._give_up()
        blocks = [b for b in blocks if len(b.steps)]
        self._buffer.extend(blocks)
        self._steps += max((len(b.steps) for b in blocks), default=0)
        self._values += sum(b.values.size for b in blocks)

    def flush(self, force: bool = False) -> None:
        """Write what was taken as a live part, if it is enough or old enough; merge live parts that have piled up.

        Args:
            force: write it in any case (though not within a minute of a failure).
        """
        if "run.json" in self._problems:
            self._try("run.json", self._save)
        old = time.monotonic() - self._flushed >= FLUSH_SECONDS
        if force or old or self._steps >= FLUSH_STEPS or self._values >= FLUSH_VALUES:
            self._try("values", self._write_live)
            self._try("merged parts", self._merge)

    def findings(self, findings: Sequence[Finding], state: dict[str, Any], rules_hash: str) -> None:
        """Replace the stored findings.

        Args:
            findings: all of them.
            state: the engine's, JSON-able.
            rules_hash: of the rule set that found them.
        """
        path = self._rank / layout.FINDINGS
        self._try("findings", lambda: write_findings(path, findings, state, rules_hash))

    def table(self, name: str, step: int, vectors: Vectors) -> None:
        """Store a table of vectors, recorded at ``step``.

        Args:
            name: snake_case.
            step: when.
            vectors: the columns.

        Raises:
            UsageError: if ``name`` is not snake_case.
        """
        path = self._rank / layout.TABLES / layout.table_name(name, self.attempt, step)

        def write() -> None:
            given = {key: arrow(c) if isinstance(c, np.ndarray) else texts(c) for key, c in vectors.items()}
            table = pa.Table.from_arrays(list(given.values()), names=list(given))
            with layout.replacing(path) as temp:
                write_table(temp, [table], table.schema)

        self._try("tables", write)

    def close(self, status: Status, error: str | None = None) -> None:
        """Write everything, merge all live parts for good, end the attempt.

        What cannot be written stays where it is, in live parts and the tail, and is read from there.

        Args:
            status: how the attempt ended.
            error: why, if it failed.
        """
        if self._closed:
            return
        self._closed = True
        self._retry_at.clear()
        self.tail.close()
        self._try("values", self._write_live)
        if self._buffer and not self.tail.holds(int(self._buffer[-1].steps[-1])):
            self._give_up()
        if self.others is not None and not self._buffer:
            self.others.drop(sys.maxsize, ended=True)
        self._try("left-over rows", self._write_left_over)
        self._try("merged parts", self._settle)
        ended = layout.now()
        with self._lock:
            self._info |= {"status": status, "ended": ended}
            self._info["attempts"][-1] |= {"status": status, "ended": ended, "error": error}
        self._try("run.json", self._save)

    def _try(self, what: str, write: Callable[[], None]) -> None:
        """Run ``write``; what the disk refuses becomes a `problem`, and is not tried again for a minute."""
        if os.getpid() != self._pid or time.monotonic() < self._retry_at.get(what, 0.0):
            return
        try:
            write()
        except OSError as e:
            self._problems[what] = f"{what} cannot be written: {e.strerror or e}"
            self._retry_at[what] = time.monotonic() + RETRY_SECONDS
        else:
            self._problems.pop(what, None)

    def _save(self) -> None:
        with self._lock:
            self._info["series"] = list(self._names.triples)
            layout.write_info(self.path, self._info)
            self._explained = len(self._info["series"])

    def _give_up(self) -> None:
        """Forget the buffer, and count what was in it."""
        first, last = int(self._buffer[0].steps[0]), int(self._buffer[-1].steps[-1])
        self.lost_values += sum(int(b.has.sum()) for b in self._buffer)
        self.lost_steps = (self.lost_steps[0] if self.lost_steps else first, last)
        self._forget()
        with self._lock:
            self._info["drops"][f"values of attempt {self.attempt}"] = (
                f"{self.lost_values:,} of steps {self.lost_steps[0]:,} to {self.lost_steps[1]:,}: {self.problem}"
            )
        self._try("run.json", self._save)

    def _forget(self) -> None:
        self._buffer, self._steps, self._values = [], 0, 0
        self._flushed = time.monotonic()

    def _write_live(self) -> None:
        if not self._buffer:
            return
        self._levels[0].append(self._write_blocks(self.attempt, self._buffer))
        self._forget()
        last = self._levels[0][-1].last
        self.tail.drop(last)
        if self.others is not None:
            self.others.drop(last)

    def _write_blocks(self, attempt: int, blocks: Sequence[ColumnBlock]) -> Part:
        """Make a live part of ``blocks``."""
        steps = np.unique(np.concatenate([b.steps for b in blocks]))
        points = gather(blocks, self._names)
        if len(self._names) > self._explained:  # no part may use an id that run.json does not explain
            self._save()
        path = self._rank / layout.LIVE / layout.part_name(attempt, int(steps[0]), int(steps[-1]))
        write_part(path, [points], len(steps))
        return Part.open(path)

    def _merge(self) -> None:
        """Keep all live parts for good if they are large together; else merge those of one size when there are many."""
        live = [p for level in self._levels for p in level]
        if sum(p.rows for p in live) >= LARGE_ROWS and sum(p.steps for p in live) >= LARGE_STEPS:
            self._keep(live)
            self._levels = [[]]
            return
        for k, level in enumerate(self._levels):
            if len(level) >= FAN:
                path = self._rank / layout.LIVE / _name(level)
                with _as_oserror():
                    write_part(path, merge(level), sum(p.steps for p in level))
                if k + 1 == len(self._levels):
                    self._levels.append([])
                self._levels[k + 1].append(Part.open(path))
                self._levels[k] = []
                _remove(level)

    def _keep(self, live: list[Part]) -> None:
        """Merge live parts of one attempt into a large part that stays, with its summary."""
        name = _name(live)

        def chunks() -> Iterator[Points]:
            summaries: list[Summaries] = []
            for points in merge(live):
                summaries.append(summarise(points))
                yield points
            # before the part itself appears, so that nobody finds one without its summary
            write_summaries(self._rank / layout.SUMMARY / name, joined_summaries(summaries))

        with _as_oserror():
            write_part(self._rank / layout.SERIES / name, chunks(), sum(p.steps for p in live), sync=True)
        _remove(live)

    def _settle(self) -> None:
        """Keep every live part of every attempt for good, and clear away what a killed process left behind."""
        series, _ = open_parts(self.path, layout.SERIES)
        live, _ = open_parts(self.path, layout.LIVE)
        for attempt in sorted({p.attempt for p in live}):
            mine = [p for p in live if p.attempt == attempt]
            rest = [p for p in visible([*series, *mine]) if p in mine]
            if rest:
                self._keep(rest)
            _remove(mine)
        self._levels = [[]]
        for temp in [*self._rank.glob(".*.tmp"), *self._rank.glob("*/.*.tmp")]:
            temp.unlink(missing_ok=True)

    def _write_left_over(self) -> None:
        """Make live parts of the rows that earlier attempts left in the tail, and remove what is left of the tail."""
        parts = [p for room in (layout.LIVE, layout.SERIES) for p in open_parts(self.path, room)[0]]
        segments = read_tail(self.path)
        try:
            metrics = load_metrics().values()
        except MetricError:  # the rows stay for a version that is whole
            return
        for attempt in sorted({s.attempt for s in segments if s.attempt < self.attempt}):
            mine = [s for s in segments if s.attempt == attempt]
            after = max((p.last for p in parts if p.attempt == attempt), default=-1)
            ranks = others_of(self._info, attempt)
            others = read_others(self.path, attempt, ranks)
            blocks, faults = columns([join(b, others) for s in mine for b in s.blocks], metrics, after)
            if faults:
                continue  # the rows stay for a version that knows the metrics they were recorded for
            if blocks:
                self._write_blocks(attempt, blocks)
            self.update(warnings=[f"attempt {attempt}: {s.fault}" for s in mine if s.fault])
            for s in mine:
                s.path.unlink(missing_ok=True)
            Others(self.path, attempt, ranks).drop(sys.maxsize, ended=True)


def _name(parts: Sequence[Part]) -> str:
    return layout.part_name(parts[0].attempt, min(p.first for p in parts), max(p.last for p in parts))


def _remove(parts: Iterable[Part]) -> None:
    for p in parts:
        p.path.unlink(missing_ok=True)


@contextmanager
def _as_oserror() -> Iterator[None]:
    """A damaged part is trouble with the disk, whatever pyarrow calls it."""
    try:
        yield
    except OSError:
        raise
    except UNREADABLE as e:
        raise OSError(f"a part is damaged: {e}") from e


def _claimed(folder: Path) -> tuple[Path, bool]:
    """The first of ``folder``, ``folder-2``, … that is free, taken so that no other process gets it too."""
    for n in count(1):
        path = folder if n == 1 else folder.with_name(f"{folder.name}-{n}")
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            continue
        path.mkdir(parents=True, exist_ok=True)
        try:
            (path / layout.RANK).mkdir()
        except FileExistsError:
            continue
        return path, n > 1
    raise AssertionError("unreachable")


def _resumed(folder: Path, start_step: int | None) -> tuple[dict[str, Any], int]:
    """The run.json of ``folder`` made ready for another attempt, and the attempt's first step."""
    run = Run(folder)
    process = run.info["process"]
    if run.is_live and process["pid"] != os.getpid():
        raise UsageError(
            f"{str(folder)!r} is being written by process {process['pid']}: wait for it to end, or give another folder"
        )
    info = run.info
    for attempt in info["attempts"]:
        if attempt["status"] == "running":
            attempt["status"] = "died"
    info |= {"status": "running", "ended": None, "process": this_process()}
    if start_step is None:
        start_step = run.next_step
    return info, start_step
