"""Reads a run folder: the one way in for the command line, the dashboard, reports and the user.

A folder is data from anywhere: nothing in it is executed, paths outside it are not followed, and what is damaged is
named in `Run.warnings` while the rest is read. Folders are listed in the direction in which values travel (tail, live,
series), so that a reader beside a running writer misses none, and counts none twice thanks to the cover rule.
"""

from __future__ import annotations

import html
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from monitor.block import ColumnBlock, RawBlock, Steps, apply
from monitor.errors import MetricError, RunFormatError, UsageError
from monitor.metric import Array, Block, Metric, load_metrics
from monitor.store import layout
from monitor.store.dense import aligned, dense, stacked
from monitor.store.find import find_runs
from monitor.store.parts import (
    UNREADABLE,
    Ids,
    Names,
    Part,
    Points,
    arrow,
    gather,
    joined,
    open_parts,
    table_of,
    texts,
    utf8,
    visible,
)
from monitor.store.process import is_alive
from monitor.store.ranks import join, others_of, read_others
from monitor.store.stored import Stored, read_findings
from monitor.store.summary import SeriesSummary, Summaries, SummaryFile, combine, summarise
from monitor.store.tail import columns, read_tail

if TYPE_CHECKING:
    import pandas as pd
    from duckdb import DuckDBPyRelation

    from monitor.diagnosis.finding import Finding, Incident, Verdict

_SHOWN = 5  # names in an error
#: Recorded with every step, and not in a row of what was evaluated or logged after the last one.
_TIMED = "step_time.monitor_seconds"


class _Tail(NamedTuple):
    """The rows of one attempt that no part holds yet; quacks like a `Part` once evaluated."""

    attempt: int
    first: int
    last: int
    steps: int
    blocks: list[RawBlock]
    points: Points

    def read(self, ids: Ids | None = None) -> Points:
        return self.points if ids is None else self.points.where(np.isin(self.points.series, ids))


class Run:
    """A run as it was when it was opened; open it again to see what was recorded since.

    Reading goes on working while a writer replaces the parts: those that may vanish are held open.

    A later attempt replaces the steps of earlier ones from its first recorded step on: that is the history `block`,
    `series`, ``first_step`` and ``last_step`` speak of. Give ``attempt`` for what one attempt recorded. Summaries and
    ``steps`` count everything.

    Args:
        path: a run folder.
        before: the same run as it was opened earlier: what it has read of parts that still stand is not read again.

    Raises:
        RunFormatError: if it is not one, or its run.json cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str], before: Run | None = None) -> None:
        self.path = Path(path).absolute()
        info = layout.read_info(self.path)
        segments = read_tail(self.path)
        known = before._files if before else ()
        live, live_faults = open_parts(self.path, layout.LIVE, known)
        series, series_faults = open_parts(self.path, layout.SERIES, known)
        if info["status"] == "running":
            info = layout.read_info(self.path)  # after the listing: it explains every id in the parts found
        #: What run.json holds.
        self.info: dict[str, Any] = info
        self.is_live = info["status"] == "running" and is_alive(info["process"], self._written())
        self._names = Names(info["series"])
        self._faults = [*series_faults, *live_faults]
        self._files = visible([*series, *live])
        self._tails: list[_Tail] = []
        for attempt in sorted({s.attempt for s in segments}):
            mine = [s for s in segments if s.attempt == attempt]
            after = max((p.last for p in self._files if p.attempt == attempt), default=-1)
            others = read_others(self.path, attempt, others_of(info, attempt))
            blocks = [join(b, others) for s in mine for b in s.blocks]
            steps = np.unique(np.concatenate([np.zeros(0, np.int64), *(b.steps for b in blocks)]))
            steps = steps[steps > after]
            if len(steps):
                self._tails.append(_Tail(attempt, int(steps[0]), int(steps[-1]), len(steps), blocks, joined(())))
            # the frame that a live writer is just writing is no fault
            self._faults += [s.fault for s in mine if s.fault and not (self.is_live and s.cut and s is mine[-1])]
        self._lock = Lock()
        self._evaluated = False
        self._asked: dict[str | None, list[SeriesSummary]] = {}
        here = set(self._files)  # parts are written once, so what was read of one is kept as long as it stands
        self._stored: dict[Part, SummaryFile | None] = {}
        self._points_of: dict[tuple[Part, str], Points] = {}
        if before is not None:
            self._stored |= {p: file for p, file in before._stored.items() if p in here}
            self._points_of |= {k: points for k, points in before._points_of.items() if k[0] in here}
        self._verdict: Verdict | None = None

    # ------------------------------------------------------------------ what it is

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.path.name

    @property
    def status(self) -> str:
        """``running``, ``finished``, ``failed``, ``interrupted``, ``detached``, or ``died`` without a word."""
        status: str = self.info["status"]
        return "died" if status == "running" and not self.is_live else status

    @property
    def facts(self) -> dict[str, Any]:
        """What was known without tensors: modules, parameters, optimizers, precision."""
        return self.info["facts"]

    @property
    def attempts(self) -> int:
        """How many times it was started; ``info["attempts"]`` says when and how each ended."""
        return len(self.info["attempts"])

    @cached_property
    def steps(self) -> int:
        """Number of recorded steps, of all attempts; a row of what was logged after the last one is no step."""
        rows = sum(p.steps for p in (*self._files, *self._tails))
        if self.info["status"] == "running" and self.attempts == 1:  # there is none yet
            return rows
        timed = sum(s.n for s in self.summary(_TIMED))
        return timed if timed > 0 and rows - self.attempts <= timed <= rows else rows

    @property
    def first_step(self) -> int | None:
        """The first recorded step, None if there is none."""
        return min((p.first for p in (*self._files, *self._tails)), default=None)

    @property
    def last_step(self) -> int | None:
        """The last recorded step of the last attempt that recorded any."""
        return max(((p.attempt, p.last) for p in (*self._files, *self._tails)), default=(0, None))[1]

    def last_step_of(self, attempt: int) -> int | None:
        """The last step that an attempt recorded, None if it recorded none."""
        return max((p.last for p in (*self._files, *self._tails) if p.attempt == attempt), default=None)

    @property
    def settled_step(self) -> int:
        """Up to here parts hold all values, and only another attempt can change them; -1 if none is."""
        waiting = [t.first - 1 for t in self._tails]
        return min([*waiting, -1 if self.last_step is None else self.last_step])

    @property
    def next_step(self) -> int:
        """The step that another attempt begins with: a row of what was logged after the last one has its number."""
        last = self.last_step
        if last is None:
            return 0
        timed = self.block(_TIMED, first=last - 1).steps if self.modules(_TIMED) else ()
        return last if last - 1 in timed and last not in timed else last + 1

    @property
    def warnings(self) -> list[str]:
        """What could not be recorded, what was dropped, and what cannot be read, a line each."""
        drops = [f"dropped {what}: {how}" for what, how in self.info["drops"].items()]
        self._evaluate()
        return list(dict.fromkeys([*self.info["warnings"], *drops, *self._faults]))

    # ------------------------------------------------------------------ what there is

    def metrics(self) -> dict[str, list[str]]:
        """Metric -> the columns of it that were recorded, in the order of their first values."""
        found: dict[str, list[str]] = {}
        self._evaluate()
        for metric, column in self._names.columns():
            found.setdefault(metric, []).append(column)
        return found

    def refs(self) -> list[str]:
        """Every ``"metric.column"`` that can be asked for: the recorded ones, then those computed from them."""
        recorded = [f"{m}.{c}" for m, cs in self.metrics().items() for c in cs]
        found = dict.fromkeys(recorded)
        waiting = [m for m in self._definitions().values() if m.derived]
        for _ in range(len(waiting)):  # a derived metric may need another one
            for m in waiting:
                if all(n in found for n in m.needs):
                    found |= dict.fromkeys(f"{m.id}.{c.name}" for c in m.columns)
        return list(found)

    def modules(self, ref: str) -> tuple[str, ...]:
        """The modules ``ref`` was recorded for, in order of execution; none if it was not recorded.

        A computed column has the modules of what it needs.
        """
        metric, column = _split(ref)
        self._evaluate()
        recorded = list(self._names.of(metric, column))
        if not recorded:
            m = self._definitions().get(metric)
            if m is None or not m.derived or all(c.name != column for c in m.columns):
                return ()
            several = [self.modules(n) for n in m.needs]
            return tuple(x for x in several[0] if all(x in other for other in several[1:]))
        # a module whose first value came late (a layer that was thawed) still stands where it is executed
        place = {p["name"]: i for i, p in enumerate(self.facts.get("parameters", ()))}
        return tuple(sorted(recorded, key=lambda m: place.get(m, len(place))))

    # ------------------------------------------------------------------ values

    def block(
        self,
        ref: str,
        modules: Iterable[str] | None = None,
        first: int | None = None,
        last: int | None = None,
        attempt: int | None = None,
    ) -> Block:
        """The values of one column.

        Args:
            ref: ``"metric.column"``, recorded or computed.
            modules: which, in which order; all in order of execution without. Unrecorded ones are empty columns.
            first: first step.
            last: last step, included.
            attempt: only what this attempt recorded.

        Returns:
            A block of the one name ``ref`` over the steps at which any of the modules has a value; float64, and a mask.

        Raises:
            UsageError: if ``ref`` is neither recorded nor a column of a known metric.
        """
        self._known(ref)
        return self._block(ref, modules, first, last, attempt)

    def series(self, ref: str, module: str = "") -> tuple[Steps, Array]:
        """One series.

        Args:
            ref: ``"metric.column"``, recorded or computed.
            module: "" for a value of the whole run.

        Returns:
            ``steps`` int64 and ``values`` float64, where there is a value.

        Raises:
            UsageError: if it was not recorded.
        """
        self._known(ref)
        modules = self.modules(ref)
        if module not in modules:
            raise UsageError(f"{ref} has no module {module!r:.80}; it was recorded for {_some(modules)}")
        block = self.block(ref, [module])
        has = block.has(ref)[:, 0]
        return block.steps[has], block[ref][has, 0]

    def frame(self, metric: str) -> pd.DataFrame:
        """One metric as a tidy table.

        Args:
            metric: its id.

        Returns:
            One row per step and module: ``step``, ``module``, then the columns; ``attempt`` first if there were
            several, superseded steps included. NaN where a column has no value (`block` tells it from a recorded NaN).

        Raises:
            UsageError: if nothing of it was recorded.
        """
        import pandas as pd

        refs = [r for r in self.refs() if _split(r)[0] == metric]
        if not refs:
            raise UsageError(f"nothing of a metric {metric!r:.80} was recorded; there are {_some(self.metrics())}")
        several = sorted({p.attempt for p in (*self._files, *self._tails)})
        frames = []
        for attempt in several:
            block = aligned({r: self.block(r, attempt=attempt) for r in refs})
            any_value = np.any([block.has(r) for r in refs], axis=0)
            row, column = np.nonzero(any_value)
            data: dict[str, Any] = {"attempt": attempt} if len(several) > 1 else {}
            data |= {"step": block.steps[row], "module": np.array(utf8(block.modules), dtype=object)[column]}
            data |= {_split(r)[1]: block[r][any_value] for r in refs}
            frames.append(pd.DataFrame(data))
        return pd.concat(frames, ignore_index=True)

    def summary(self, ref: str | None = None) -> list[SeriesSummary]:
        """Summaries of series; of recorded ones without reading their values, where large parts hold them.

        Args:
            ref: only of this column; every recorded one without.

        Returns:
            One per series: those of one column in order of execution, all in the order of their first values; none
            if ``ref`` was not recorded.
        """
        if ref not in self._asked:
            self._asked[ref] = self._summary(ref)
        return list(self._asked[ref])

    def sql(self, query: str) -> DuckDBPyRelation:
        """Ask DuckDB: ``run.sql("select module, max(value) from series where metric = 'grad_norm' group by module")``.

        Args:
            query: over the view ``series`` with the columns attempt, metric, column, module, step, value; all attempts.

        Returns:
            A relation: ``.df()`` for pandas, ``.fetchall()`` for tuples.
        """
        import duckdb
        import pyarrow.dataset as ds

        self._evaluate()
        here = duckdb.connect()
        ids = arrow(np.arange(len(self._names), dtype=np.int32))
        words = [texts(t[i] for t in self._names.triples) for i in range(3)]
        here.register("names", pa.Table.from_arrays([ids, *words], names=["series", "metric", "column", "module"]))
        selects = []
        # as Arrow data sets of explicit files: DuckDB would read a path with brackets in it as a pattern
        large = [p for p in self._files if p.path.parent.name == layout.SERIES]
        sources = [(p.attempt, ds.dataset(str(p.path), format="parquet")) for p in large]
        sources += [(p.attempt, table_of(p.read())) for p in (*self._files, *self._tails) if p not in large]
        for i, (attempt, source) in enumerate(sources or [(0, table_of(joined(())))]):
            here.register(f"part_{i}", source)
            selects.append(f"select {attempt} as attempt, * from part_{i}")
        here.execute(
            'create view series as select attempt, metric, "column", module, step, value '
            f"from ({' union all '.join(selects)}) join names using (series)"
        )
        return here.sql(query)

    def tables(self) -> list[tuple[str, int, int]]:
        """``(name, attempt, step)`` of every stored table of vectors."""
        found = (layout.parse_table(n) for n in layout.names(self.path, layout.TABLES))
        return sorted(t for t in found if t is not None)

    def table(self, name: str, step: int, attempt: int = 0) -> pa.Table:
        """One of `tables`.

        Raises:
            UsageError: if there is no such table.
            RunFormatError: if it is damaged.
        """
        if (name, attempt, step) not in self.tables():
            raise UsageError(
                f"no table {name!r:.80} of step {step}, attempt {attempt}; there are {_some(self.tables())}"
            )
        path = self.path / layout.RANK / layout.TABLES / layout.table_name(name, attempt, step)
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                return file.read(use_threads=False)
        except UNREADABLE as e:
            raise RunFormatError(f"{str(path)!r}: cannot be read: {e}") from e

    # ------------------------------------------------------------------ what is wrong with it

    def stored_findings(self) -> Stored | None:
        """What the recorder found while recording, or None if it stored nothing that can be read."""
        path = self.path / layout.RANK / layout.FINDINGS
        if not path.is_file() or not layout.inside(self.path, path):
            return None
        try:
            return read_findings(path)
        except FileNotFoundError:
            return None
        except ValueError as e:
            self._fault(f"{layout.FINDINGS} cannot be read: {e}")
            return None

    def verdict(self) -> Verdict:
        """What is wrong with the run, over everything that was recorded when it was opened."""
        from monitor.diagnosis.report import report

        found = self._verdict or report(self)
        self._verdict = found
        return found

    def incidents(self) -> list[Incident]:
        """Findings grouped by cause, the worst first."""
        return list(self.verdict().incidents)

    def findings(self) -> list[Finding]:
        """Everything found, the earliest first."""
        from monitor.diagnosis.engine import place

        return sorted((f for i in self.incidents() for f in i.findings), key=place)

    # ------------------------------------------------------------------ how it shows

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}: {', '.join(self._headline())})"

    def _repr_html_(self) -> str:
        rows = [(m, ", ".join(cs), len(self.modules(f"{m}.{cs[0]}"))) for m, cs in self.metrics().items()]
        cells = "".join(f"<tr>{''.join(f'<td>{html.escape(str(c))}</td>' for c in r)}</tr>" for r in rows)
        head = "<tr><th>metric</th><th>columns</th><th>modules</th></tr>"
        return (
            f"<p><b>{html.escape(self.name)}</b>: {html.escape(', '.join(self._headline()))}</p>"
            f"<table>{head}{cells}</table>"
        )

    def _headline(self) -> list[str]:
        words = [
            self.status.encode("unicode_escape").decode(),
            f"{self.steps:,} steps",
            f"{len(self.metrics())} metrics",
        ]
        return words + ([f"{self.attempts} attempts"] if self.attempts > 1 else [])

    # ------------------------------------------------------------------ inside

    def _written(self) -> float:
        """When anything in the folder was last written, seconds of the epoch."""
        rooms = [self.path / layout.RANK / room for room in (layout.TAIL, layout.LIVE)]
        files = [self.path / layout.RUN_JSON]
        files += [place / n for place in rooms for n in layout.names(self.path, place.name)]
        latest = 0.0
        for file in files:
            with suppress(OSError):
                latest = max(latest, file.stat().st_mtime)
        return latest

    def _definitions(self) -> Mapping[str, Metric]:
        try:
            return load_metrics()
        except MetricError as e:
            self._fault(f"no metric can be computed: {e}")
            return {}

    def _fault(self, line: str) -> None:
        if line not in self._faults:
            self._faults.append(line)

    def _evaluate(self) -> None:
        """Turn the rows of the tail into points; they may bring series that no part has."""
        with self._lock:  # sessions of a dashboard share a run
            if self._evaluated or not self._tails:
                return
            metrics = self._definitions().values()
            for i, tail in enumerate(self._tails):
                blocks, faults = columns(tail.blocks, metrics, tail.first - 1)
                self._tails[i] = tail._replace(points=gather(blocks, self._names), blocks=[])
                for f in faults:
                    self._fault(f)
            self._evaluated = True

    def _known(self, ref: str) -> None:
        metric, column = _split(ref)
        self._evaluate()
        if self._names.of(metric, column):
            return
        m = self._definitions().get(metric)
        if m is None or all(c.name != column for c in m.columns):
            raise UsageError(f"no column {ref!r:.80}; there are {_some(self.refs())}")

    def _points(self, ids: Ids | None, first: int | None, last: int | None, attempt: int | None) -> Iterator[Points]:
        """The rows of some series, part by part, in the order of recording; what is damaged is left out, said so."""
        self._evaluate()
        parts = sorted((*self._files, *self._tails), key=lambda p: (p.attempt, p.first))
        begins: dict[int, int] = {}
        for p in parts:
            begins.setdefault(p.attempt, p.first)
        for p in parts:
            if attempt not in (None, p.attempt):
                continue
            low = p.first if first is None else first
            high = p.last if last is None else last
            if attempt is None:
                high = min([high, *(begin - 1 for a, begin in begins.items() if a > p.attempt)])
            if p.last < low or high < p.first:
                continue
            try:
                points = p.read(ids)
            except UNREADABLE as e:
                self._damaged(p, e)
                continue
            if low > p.first or high < p.last:
                points = points.where((points.steps >= low) & (points.steps <= high))
            yield points

    def _damaged(self, part: Part | _Tail, e: Exception) -> None:
        if isinstance(part, Part):
            self._fault(f"{part.path.parent.name}/{part.path.name} is damaged: {e}")
            self._files = [p for p in self._files if p is not part]

    def _block(
        self, ref: str, modules: Iterable[str] | None, first: int | None, last: int | None, attempt: int | None
    ) -> Block:
        names = tuple(self.modules(ref) if modules is None else modules)
        ids = self._names.of(*_split(ref))
        m = self._definitions().get(_split(ref)[0]) if not ids else None
        if m is not None and m.derived:
            return self._derived(m, ref, names, first, last, attempt)
        wanted = {ids[name]: i for i, name in enumerate(names) if name in ids}
        place = np.full(len(self._names), -1, dtype=np.intp)
        place[list(wanted)] = list(wanted.values())
        read = self._points(np.array(list(wanted), dtype=np.int32), first, last, attempt)
        chunks = [dense(p, place, len(names)) for p in read if len(p.series)]
        steps, values, has = stacked(chunks, len(names))
        return Block(steps, names, {ref: values}, {ref: has})

    def _derived(
        self,
        m: Metric,
        ref: str,
        modules: tuple[str, ...],
        first: int | None,
        last: int | None,
        attempt: int | None,
    ) -> Block:
        """A computed column, from as many earlier recorded steps as its formula looks back."""
        reach = m.lookback
        while True:
            start = None if first is None else first - reach
            # the values of one module need no other's, so nothing else is read
            block = aligned({n: self._block(n, self._narrow(n, modules), start, last, attempt) for n in m.needs})
            before = 0 if first is None else int(np.searchsorted(block.steps, first))
            if start is None or before >= m.lookback or start <= (self.first_step or 0):
                break
            reach *= 4
        answer = next(b for b in apply(m, block) if b.ref == ref)
        values = np.full((len(block.steps), len(modules)), np.nan)
        has = np.zeros(values.shape, dtype=np.bool_)
        for i, name in enumerate(modules):
            if name in answer.modules:
                j = answer.modules.index(name)
                values[:, i], has[:, i] = answer.values[:, j], answer.has[:, j]
        rows = slice(before, None)
        return Block(block.steps[rows], modules, {ref: values[rows]}, {ref: has[rows]})

    def _narrow(self, ref: str, modules: tuple[str, ...]) -> tuple[str, ...]:
        recorded = self.modules(ref)
        return tuple(m for m in recorded if m in modules) or recorded

    def _summary(self, ref: str | None) -> list[SeriesSummary]:
        if ref is None:
            return combine(self._summaries(), self._names)
        modules = self.modules(ref)
        if recorded := self._names.of(*_split(ref)):
            found = combine(self._summaries(ref), self._names, recorded.values())
        elif modules:
            names = Names()
            parts = [self.block(ref, attempt=a) for a in sorted({p.attempt for p in (*self._files, *self._tails)})]
            blocks = [ColumnBlock(*_split(ref), b.steps, b.modules, b[ref], b.has(ref)) for b in parts]
            found = combine([summarise(gather([b], names)) for b in blocks], names)
        else:
            return []
        place = {m: i for i, m in enumerate(modules)}
        return sorted(found, key=lambda s: place[s.module])

    def _summaries(self, ref: str | None = None) -> list[Summaries]:
        """Summaries of the large parts, and of what has none, in the order of recording; of one column if it is named.

        Of other columns there may be some beside them.
        """
        self._evaluate()
        ids = None if ref is None else np.array(list(self._names.of(*_split(ref)).values()), dtype=np.int32)
        found: list[Summaries] = []
        waiting: list[Points] = []

        def settle() -> None:
            points = joined(waiting)
            if len(points.series):
                # stable: attempts stay in the order of recording
                found.append(summarise(points.where(np.argsort(points.series, kind="stable"))))
            waiting.clear()

        for p in sorted((*self._files, *self._tails), key=lambda p: (p.attempt, p.first)):
            try:
                if isinstance(p, Part) and (file := self._summary_file(p)) is not None:
                    stored = file.read(ids)
                    settle()
                    found.append(stored)
                    continue
            except UNREADABLE:
                assert isinstance(p, Part)
                self._stored[p] = None  # the values tell the same
            try:
                waiting.append(self._kept(p, ref, ids))
            except UNREADABLE as e:
                self._damaged(p, e)
        settle()
        return found

    def _kept(self, p: Part | _Tail, ref: str | None, ids: Ids | None) -> Points:
        """The rows of one column in a part without a summary, read once."""
        if ref is None or not isinstance(p, Part):
            return p.read(ids)
        if (p, ref) not in self._points_of:
            self._points_of[p, ref] = p.read(ids)
        return self._points_of[p, ref]

    def _summary_file(self, part: Part) -> SummaryFile | None:
        """The stored summary of a part, if there is one and it is whole."""
        if part not in self._stored:
            path = self.path / layout.RANK / layout.SUMMARY / part.path.name
            self._stored[part] = None
            with suppress(*UNREADABLE):
                file = SummaryFile(path) if layout.inside(self.path, path) else None
                self._stored[part] = file if file is not None and file.values == part.rows else None
        return self._stored[part]


def open_run(path: str | os.PathLike[str], before: Run | None = None) -> Run:
    """Open a run folder.

    Args:
        path: the folder of one run.
        before: the same run as it was opened earlier, to see what was recorded since without reading all of it again.

    Raises:
        RunFormatError: if it is not one; a folder of runs is told apart, and its runs are named.
    """
    folder = Path(path)
    if not folder.exists():
        raise RunFormatError(f"{str(path)!r}: no such folder")
    if not folder.is_dir():
        raise RunFormatError(f"{str(path)!r} is a file, expected the folder of a run")
    if not (folder / layout.RUN_JSON).exists() and (runs := find_runs(folder)):
        raise RunFormatError(f"{str(path)!r} holds {len(runs)} runs, expected one; name it: {_some(map(str, runs))}")
    return Run(folder, before)


def _split(ref: str) -> tuple[str, str]:
    metric, dot, column = ref.partition(".")
    if not dot:
        raise UsageError(f"{ref!r:.80} is not a column; write it as 'metric.column', like 'loss.value'")
    return metric, column


def _some(names: Iterable[object]) -> str:
    shown: Sequence[str] = [repr(n) for n in names]
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return (", ".join(shown[:_SHOWN]) or "nothing") + more
