"""Runs as the pages see them: opened once per change on disk, reduced to what a screen can show.

Everything drawn comes from `monitor.store` and `monitor.diagnosis`; nothing is computed here but a choice of points.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import streamlit as st
from monitor.store.run import Run, find_runs, open_run

from monitor.diagnosis.finding import Verdict
from monitor.metric import Metric, load_metrics
from monitor_dashboard import sampling
from monitor_dashboard.sampling import Grid, Line

#: Where the command line says which run, or which folder of runs, to show.
RUNS_VARIABLE = "MONITOR_RUNS"

#: Columns drawn together where a metric's one default column would say too little.
TOGETHER = {"logit_norm": ("mean", "max")}

#: Values held at once while a map is reduced; 8 bytes each.
_CHUNK = 4_000_000

Stamp = tuple[tuple[str, int, int], ...]


def runs_root() -> Path:
    """What to show: a run or a folder of runs; ``runs`` under the working directory unless told otherwise."""
    return Path(os.environ.get(RUNS_VARIABLE) or "runs")


def list_runs() -> list[Path]:
    """The runs at `runs_root`, newest first."""
    return find_runs(runs_root())


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


class View:
    """A run at one moment, with what was already read for drawing it. Shared by all sessions that look at it."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.line = lru_cache(maxsize=256)(self._line)
        self.grid = lru_cache(maxsize=16)(self._grid)

    @cached_property
    def verdict(self) -> Verdict:
        """What is wrong with the run."""
        return self.run.verdict()

    @cached_property
    def metrics(self) -> dict[str, Metric]:
        """The recorded metrics that this version knows, by id."""
        known = load_metrics()
        return {name: known[name] for name in self.run.metrics() if name in known}

    def plotted(self, kind: str) -> list[Metric]:
        """Recorded metrics drawn as ``"line"`` or ``"heatmap"``."""
        return [m for m in self.metrics.values() if m.plot.kind == kind and self.run.modules(main_column(m))]

    def modules(self, ref: str) -> tuple[str, ...]:
        """Modules for which ``ref`` was recorded, in order of execution."""
        return self.run.modules(ref)

    def _line(self, ref: str, module: str, first: int, last: int, log: bool) -> Line:
        steps, values = self.run.series(ref, module)
        inside = slice(*np.searchsorted(steps, (first, last + 1)))
        return sampling.line(steps[inside], values[inside], log=log)

    def _grid(self, ref: str, first: int, last: int) -> Grid:
        modules = self.run.modules(ref)
        steps, _ = self.run.series(ref, modules[0])
        steps = steps[slice(*np.searchsorted(steps, (first, last + 1)))]
        interval = int(np.median(np.diff(steps))) if len(steps) > 1 else 1
        rows = min(len(modules), sampling.MAX_ROWS)
        width, number = sampling.columns(first, last, rows, interval)
        together = max(1, _CHUNK // max(len(steps), 1))
        parts = []
        for at in range(0, len(modules), together):
            block = self.run.block(ref, modules=modules[at : at + together], first=first, last=last)
            parts.append(sampling.cells(block.steps, block[ref], block.has(ref), first, width, number))
        values, state = (np.concatenate([p[i] for p in parts]) for i in (0, 1))
        shown = sampling.worst_rows(values, state, rows)
        starts = first + width * np.arange(number, dtype=np.int64)
        return Grid(
            tuple(modules[i] for i in shown), starts, width, values[shown], state[shown], len(modules) - len(shown)
        )


def main_column(metric: Metric) -> str:
    """The column a metric is drawn by, as ``"metric.column"``."""
    return f"{metric.id}.{metric.plot.column}"


def unit(metric: Metric) -> str:
    """Unit of `main_column`; "" for a pure number."""
    found = metric.column(metric.plot.column).unit
    return "" if found == "1" else found


def columns(metric: Metric) -> Sequence[str]:
    """The columns of a metric that are drawn together, as ``"metric.column"``."""
    return [f"{metric.id}.{c}" for c in TOGETHER.get(metric.id, (metric.plot.column,))]


@st.cache_resource(max_entries=8, show_spinner=False)
def _view(path: str, stamp: Stamp) -> View:
    return View(open_run(path))


def view(path: Path) -> View:
    """The run at ``path`` as it is on disk now.

    Raises:
        RunFormatError: if there is no readable run.
    """
    return _view(str(path), stamp(path))
