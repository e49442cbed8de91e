"""Runs as the pages see them: opened once per change on disk, reduced to what a screen can show.

Everything drawn comes from `monitor.store` and `monitor.diagnosis`; nothing is computed here but a choice of points.
"""

from __future__ import annotations

import math
import os
from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from threading import RLock
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import streamlit as st

from monitor.diagnosis.comparison import Comparison, Parting, compare, noise_band, parting
from monitor.diagnosis.finding import Verdict
from monitor.diagnosis.phases import LogTime, Phases, log_distance, phases
from monitor.diagnosis.remarks import Remark, remarks
from monitor.diagnosis.transition import Transition, transition
from monitor.errors import RunFormatError
from monitor.metric import SITES, Block, Metric, load_metrics
from monitor.store.find import find_runs
from monitor.store.run import Run, open_run
from monitor.store.summary import SeriesSummary
from monitor_dashboard import sampling
from monitor_dashboard.sampling import Floats, Fold, Grid, Line

#: Where the command line says which run, or which folder of runs, to show.
RUNS_VARIABLE = "MONITOR_RUNS"

#: Columns drawn together where a metric's one default column would say too little.
TOGETHER = {"logit_norm": ("mean", "max")}

#: Values held at once while a map is reduced; 8 bytes each.
_CHUNK = 4_000_000

#: A series whose values span this factor opens on a log scale.
_WIDE = 100.0

#: Reduced maps, and lines, held for the views of a run to come.
_KEPT, _FOLDED = 16, 256

#: Steps by which the distance of two recorded ones is judged, and how many of those it takes.
_LATEST, _FEW = 1000, 8

#: What is told of a whole run in words, and is read anew only when there is a tenth more of it.
_SLOW = ("remarks", "phases", "transition", "log_distance")

Stamp = tuple[tuple[str, int, int], ...]


def runs_root() -> Path:
    """What to show: a run or a folder of runs; ``runs`` under the working directory unless told otherwise."""
    return Path(os.environ.get(RUNS_VARIABLE) or "runs")


@st.cache_data(ttl=5, max_entries=4, show_spinner=False)  # seconds: there may be thousands, and each is opened
def list_runs(root: Path) -> dict[str, Path]:
    """The runs at or below ``root``, newest first, by their path from there.

    Raises:
        RunFormatError: if there is none.
    """
    found = find_runs(root)
    if not found:
        if not root.is_dir():
            raise RunFormatError(f"{str(root)!r}: no such folder; give a run or a folder of runs")
        raise RunFormatError(f"{str(root)!r} holds no run yet; record one with: monitor run train.py")
    return {path.name if path == root else str(path.relative_to(root)): path for path in found}


def stamp(path: Path) -> Stamp:
    """Name, size and time of every file of a run: differs as soon as anything was written."""
    found = []
    for folder, folders, files in os.walk(path):
        folders.sort()
        for name in sorted(files):
            file = os.path.join(folder, name)  # noqa: PTH118 - a Path per file costs more than the stat
            try:
                status = os.stat(file)  # noqa: PTH116
            except OSError:
                continue  # replaced by a larger part between the listing and now
            found.append((file, status.st_size, status.st_mtime_ns))
    return tuple(found)


_Key = tuple[str, tuple[str, ...], int, int, int]
_Series = tuple[str, str, int, bool, int]


class _Cells(NamedTuple):
    values: Floats
    state: npt.NDArray[np.int8]
    complete: int  # leading columns to which nothing can be added any more


class View:
    """A run at one moment, with what was already read for drawing it. Shared by all sessions that look at it.

    Args:
        run: as it was just opened.
        before: the view of the same run at an earlier moment: what it has reduced is not read again.
    """

    def __init__(self, run: Run, before: View | None = None) -> None:
        self.run = run
        self._lock = RLock()  # a run may read its folder anew while it answers, and sessions are threads
        self._cells: dict[_Key, _Cells] = before._cells if before else {}
        self._folds: dict[_Series, tuple[int, Fold]] = before._folds if before else {}
        if before is not None and run.is_live and before.run.is_live and mark(before) == mark(self):
            self.__dict__ |= {name: before.__dict__[name] for name in _SLOW if name in before.__dict__}
        self.line = lru_cache(maxsize=256)(self._line)
        self.grid = lru_cache(maxsize=16)(self._grid)
        self.noise = lru_cache(maxsize=16)(self._noise)

    @property
    def span(self) -> tuple[int, int]:
        """First and last step; ``(0, 0)`` if none was recorded."""
        return self.run.first_step or 0, self.run.last_step or 0

    @cached_property
    def verdict(self) -> Verdict:
        """What is wrong with the run."""
        with self._lock:
            return self.run.verdict()

    @cached_property
    def remarks(self) -> tuple[Remark, ...]:
        """What is remarkable in the run and no incident tells."""
        verdict = self.verdict
        with self._lock:
            return remarks(self.run, verdict)

    @cached_property
    def phases(self) -> Phases | None:
        """When it memorised and when it generalised; None if nothing held out was logged."""
        with self._lock:
            return phases(self.run)

    @cached_property
    def transition(self) -> Transition | None:
        """What the markers say that need no held-out data; None if the training data were not learned."""
        with self._lock:
            return transition(self.run)

    @cached_property
    def log_distance(self) -> LogTime | None:
        """How the distance from the start grows with the logarithm of the steps; None if it was not recorded."""
        with self._lock:
            return log_distance(self.run)

    @cached_property
    def warnings(self) -> list[str]:
        """What could not be recorded or read."""
        with self._lock:
            return self.run.warnings

    @cached_property
    def refs(self) -> list[str]:
        """Every column that was recorded, or can be computed, as ``"metric.column"``."""
        with self._lock:
            return self.run.refs()

    @cached_property
    def metrics(self) -> dict[str, Metric]:
        """The metrics that were recorded, or can be computed from those that were, by id."""
        refs = set(self.refs)
        return {m.id: m for m in load_metrics().values() if main_column(m) in refs and self.modules(main_column(m))}

    def plotted(self, kind: Literal["line", "heatmap"]) -> list[Metric]:
        """The metrics that are drawn in this way, in the order in which a step reaches them."""
        return sorted((m for m in self.metrics.values() if m.plot.kind == kind), key=lambda m: SITES.index(m.site))

    def modules(self, ref: str) -> tuple[str, ...]:
        """Modules for which ``ref`` was recorded, in order of execution."""
        with self._lock:
            return self.run.modules(ref)

    def before(self, ref: str, step: int, back: int) -> Block:
        """All modules of ``ref`` over the ``back`` steps up to and with ``step``."""
        with self._lock:
            return self.run.block(ref, self.modules(ref), step - back + 1, step)

    def wide(self, ref: str, others: Sequence[View] = ()) -> bool:
        """Whether the positive values of ``ref``, here and in others, are told apart on a logarithmic scale only."""
        found: list[SeriesSummary] = []
        for view in (self, *others):
            with view._lock:
                found += view.run.summary(ref)
        lows = [float(s.band.min[s.band.min > 0].min()) for s in found if (s.band.min > 0).any()]
        highs = [s.max for s in found if s.max > 0]
        return bool(lows and highs) and max(highs) > _WIDE * min(lows)

    def last(self, ref: str) -> tuple[int, float] | None:
        """Step and value of the last point of a column of the whole run; None if it was not recorded."""
        with self._lock:
            found = self.run.summary(ref)
        return next(((s.last_step, s.last) for s in found if not s.module), None)

    def _line(self, ref: str, module: str, first: int, last: int, log: bool) -> Line:
        key = ref, module, first, log, self.run.attempts
        settled = min(last, self.run.settled_step)
        upto, known = self._folds.get(key, (first - 1, None))
        if upto > settled:  # of a later step than is asked for now
            upto, known = first - 1, None
        with self._lock:
            block = self.run.block(ref, [module], upto + 1, last)
        has = block.has(ref)[:, 0]
        steps, values = block.steps[has], block[ref][has, 0]
        old = steps <= settled
        done, rest = (Fold.of(steps[some], values[some], log=log) for some in (old, ~old))
        if known is not None:
            done = known.then(done)
        if upto <= settled:
            self._folds.pop(key, None)
            while len(self._folds) >= _FOLDED:
                self._folds.pop(next(iter(self._folds)), None)
            self._folds[key] = settled, done
        return done.then(rest).line()

    def _noise(self, ref: str, module: str, first: int, last: int, log: bool) -> tuple[Line, Line] | None:
        with self._lock:
            steps, low, high = noise_band(self.run, ref, module)
        shown = (steps >= first) & (steps <= last)
        if not shown.any():
            return None
        return sampling.line(steps[shown], low[shown], log=log), sampling.line(steps[shown], high[shown], log=log)

    def _grid(self, ref: str, first: int, last: int, only: tuple[str, ...] = ()) -> Grid:
        modules = only or self.modules(ref)
        interval = self._interval(ref, modules[:1], first, last)
        rows = min(len(modules), sampling.MAX_ROWS)
        width, number = sampling.columns(first, last, rows, interval)
        together = max(1, _CHUNK * interval // (last - first + 1))
        values, state = self._reduced(ref, modules, first, width, number, together)
        shown = sampling.worst_rows(values, state, rows)
        starts = first + width * np.arange(number, dtype=np.int64)
        names = tuple(modules[i] for i in shown)
        return Grid(names, starts, width, values[shown], state[shown], len(modules) - len(shown))

    def _interval(self, ref: str, modules: tuple[str, ...], first: int, last: int) -> int:
        """The usual distance of two recorded steps, by the latest of them."""
        back = _LATEST
        while True:
            with self._lock:
                steps = self.run.block(ref, modules, max(first, last - back), last).steps
            if len(steps) > _FEW or back > last - first:
                return int(np.median(np.diff(steps))) if len(steps) > 1 else 1
            back *= 16

    def _reduced(
        self, ref: str, modules: tuple[str, ...], first: int, width: int, number: int, together: int
    ) -> tuple[Floats, npt.NDArray[np.int8]]:
        """Values and states of ``number`` buckets; those that were complete at an earlier moment are not read again."""
        key = ref, modules, first, width, self.run.attempts
        known = self._cells.get(key)
        done = min(known.complete, number) if known else 0
        begin, last = first + done * width, first + number * width - 1
        parts = []
        for at in range(0, len(modules), together):
            with self._lock:
                block = self.run.block(ref, modules[at : at + together], begin, last)
            parts.append(sampling.cells(block.steps, block[ref], block.has(ref), begin, width, number - done))
        values, state = (np.concatenate([p[i] for p in parts]) for i in (0, 1))
        if known:
            values = np.concatenate([known.values[:, :done], values], axis=1)
            state = np.concatenate([known.state[:, :done], state], axis=1)
        if known is None or number > known.complete:
            while len(self._cells) >= _KEPT:
                self._cells.pop(next(iter(self._cells)), None)
            recorded = self.span[1] - first + 1
            self._cells[key] = _Cells(values, state, min(number, recorded // width))
        return values, state


def main_column(metric: Metric) -> str:
    """The column a metric is drawn by, as ``"metric.column"``."""
    return f"{metric.id}.{metric.plot.column}"


def unit(ref: str) -> str:
    """Unit of a column as it stands beside values; "" for a pure number, or where the name or the values say it."""
    metric, _, column = ref.partition(".")
    known = load_metrics().get(metric)
    found = next((c.unit for c in known.columns if c.name == column), "") if known else ""
    return "" if found in ("1", "fraction", metric, column) else found


def columns(metric: Metric) -> Sequence[str]:
    """The columns of a metric that are drawn together, as ``"metric.column"``."""
    return [f"{metric.id}.{c}" for c in TOGETHER.get(metric.id, (metric.plot.column,))]


@st.cache_resource(max_entries=8, show_spinner=False)
def _latest(path: str) -> list[View]:
    """A place for the last view of the run at ``path``."""
    return []


@st.cache_resource(max_entries=8, show_spinner=False)
def _view(path: str, stamp: Stamp) -> View:
    place = _latest(path)
    before = place[0] if place else None
    found = View(open_run(path, before.run if before else None), before)
    place[:] = [found]
    return found


def view(path: Path) -> View:
    """The run at ``path`` as it is on disk now.

    Raises:
        RunFormatError: if there is no readable run.
    """
    return _view(str(path), stamp(path))


def mark(view: View) -> Hashable:
    """Differs when a comparison with a run is to be made anew: when it has changed, or grown by a tenth while written.

    What is compared is read whole, which nobody wants every two seconds.
    """
    run = view.run
    if run.is_live:
        return run.attempts, int(math.log(run.steps + 1, 1.1))
    return stamp(run.path)


@st.cache_resource(max_entries=8, show_spinner=False)
def _compared(paths: tuple[str, ...], marks: tuple[Hashable, ...], _views: Sequence[View]) -> Comparison:
    with _held(_views):
        return compare([v.run for v in _views], pairs=0)


@st.cache_resource(max_entries=64, show_spinner=False)
def _laid_over(first: str, other: str, marks: tuple[Hashable, Hashable], _views: tuple[View, View]) -> Parting:
    with _held(_views):
        return parting(_views[0].run, _views[1].run)


@contextmanager
def _held(views: Sequence[View]) -> Iterator[None]:
    """No other session reads these runs meanwhile; held in one order, so that two that compare do not wait for ever."""
    with ExitStack() as stack:
        for view in sorted(views, key=lambda v: v.run.path):
            stack.enter_context(view._lock)
        yield


def compared(views: Sequence[View]) -> Comparison:
    """Runs side by side, the first being the reference, without where they part."""
    return _compared(tuple(str(v.run.path) for v in views), tuple(mark(v) for v in views), views)


def laid_over(first: View, other: View) -> Parting:
    """Where ``other`` parts from ``first``."""
    return _laid_over(str(first.run.path), str(other.run.path), (mark(first), mark(other)), (first, other))
