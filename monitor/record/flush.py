"""Between the training thread and the disk: rows go into the tail at once, blocks to a thread that does the rest.

The thread turns blocks into columns, folds the rules over them and writes. The training thread never waits for it: the
queue is short, and when it is full a block is dropped and counted.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from monitor.block import ColumnBlock, Layout, RawBlock, evaluate
from monitor.diagnosis.engine import Engine, rules_hash
from monitor.diagnosis.finding import Finding
from monitor.diagnosis.report import describe, judged
from monitor.diagnosis.text import plain
from monitor.errors import MetricError
from monitor.metric import Metric, load_metrics
from monitor.rule import load_rules
from monitor.store.parts import Vectors
from monitor.store.run import open_run
from monitor.store.writer import RunWriter

#: Blocks that may wait for the thread. A block is some 200 kB; eight are more than a minute of a large model.
WAITING = 8
#: Seconds the end of a run waits for the thread.
PATIENCE = 30.0
#: Seconds between two writes of findings and overhead, and how often the CPU time of a write goes into them at least:
#: of very many tensors a write is some ten megabytes.
FINDINGS_EVERY, FINDINGS_SHARE = 5.0, 200


class Taker(Protocol):
    """What a recording hands its rows to."""

    def layout(self, layout: Layout) -> None:
        """From now on rows have this layout."""

    def row(self, step: int, layout_number: int, payload: bytes) -> None:
        """Keep one row even if the process dies now."""

    def take(self, block: RawBlock) -> None:
        """These rows, which `row` was given before, are complete."""

    def facts(self, facts: dict[str, Any]) -> None:
        """The facts are known, or have changed."""

    def warn(self, text: str) -> None:
        """Write a warning into the run."""

    def table(self, name: str, step: int, vectors: Vectors) -> None:
        """Write a table of vectors."""


class Flusher:
    """Takes rows and blocks of one run.

    Args:
        writer: the run folder, open for writing.
        say: prints one line to the user.
    """

    def __init__(self, writer: RunWriter, say: Callable[[str], None]) -> None:
        self.writer = writer
        self._say = say
        self.metrics: dict[str, Metric] = load_metrics()
        self._rules = load_rules()
        self._hash = rules_hash(self._rules)
        self._facts: dict[str, Any] = {}
        self._engine: Engine | None = None
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue()
        self._described: set[str] = set()  # columns that run.json tells of
        self._blocks = 0
        self._lock = threading.Lock()
        self._warnings: list[str] = []
        self._said: set[tuple[str, str]] = set()
        self._saved, self._saving = time.monotonic(), 0.0
        self.dropped_rows = 0
        self.cpu = 0.0
        self.overhead: Callable[[], Mapping[str, Any]] = dict
        self.missing: Callable[[], list[tuple[str, str]]] = list
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name="monitor-writer", daemon=True)
        self._thread.start()

    @property
    def path(self) -> Path:
        """The run folder."""
        return self.writer.path

    # ---- called on the training thread

    def layout(self, layout: Layout) -> None:
        """From now on rows have this layout."""
        self.writer.tail.layout(layout)

    def row(self, step: int, layout_number: int, payload: bytes) -> None:
        """Keep one row even if the process dies now."""
        self.writer.tail.row(step, layout_number, payload)

    def take(self, block: RawBlock) -> None:
        """Hand a block to the thread; if too many wait already, drop and count it."""
        with self._lock:
            if self._blocks >= WAITING:
                self.dropped_rows += len(block.steps)
                return
            self._blocks += 1
        self.writer.tail.rotate(int(block.steps[-1]) + 1)
        self._queue.put(("block", block))

    def facts(self, facts: dict[str, Any]) -> None:
        """The facts are known, or have changed."""
        self._queue.put(("facts", facts))

    def warn(self, text: str) -> None:
        """Write a warning into the run."""
        self._queue.put(("warn", text))

    def table(self, name: str, step: int, vectors: Vectors) -> None:
        """Write a table of vectors."""
        self._queue.put(("table", (name, step, vectors)))

    def close(self, status: str, error: str | None) -> bool:
        """Write what is left and end the run.

        Returns:
            False if the thread did not finish in time; the tail then holds what it had not written.
        """
        if os.getpid() != self._pid:
            return False
        self._queue.put(("close", (status, error)))
        self._thread.join(PATIENCE)
        return not self._thread.is_alive()

    # ---- the thread

    def _run(self) -> None:
        while True:
            kind, what = self._queue.get()
            begin = time.thread_time()
            try:
                if kind == "block":
                    with self._lock:
                        self._blocks -= 1
                    self._block(what)
                elif kind == "facts":
                    self._new_facts(what)
                elif kind == "warn":
                    self._warnings.append(what)
                    self.writer.update(warnings=list(self._warnings))
                elif kind == "table":
                    self.writer.table(*what)
                elif kind == "close":
                    self._save()
                    self.writer.close(*what)
                    return
            except Exception as e:
                # the last line of defence: whatever it is, the training goes on and the reader is told
                self._warnings.append(f"the writer failed on a {kind}: {type(e).__name__}: {e}")
                if kind == "close":
                    return
            finally:
                self._complain()
                self.cpu += time.thread_time() - begin

    def _new_facts(self, facts: dict[str, Any]) -> None:
        self._facts = facts
        if self._engine is not None:
            self._engine.facts = facts
        self.writer.update(facts=facts)

    def _block(self, block: RawBlock) -> None:
        if self.writer.others is not None:
            block = self.writer.others.join(block)
        columns = evaluate(block, self.metrics.values(), self._failed)
        if self._engine is None:
            attempt = self.writer.attempt
            before = judged(open_run(self.path), self._rules, attempt) if attempt else None
            self._engine = Engine(self._rules, self._facts, attempt, before)
        self.writer.append(columns)
        self._describe(columns)
        self._engine.feed(columns)
        self._announce(self._engine.findings())
        self.writer.flush()
        if time.monotonic() - self._saved > max(FINDINGS_EVERY, FINDINGS_SHARE * self._saving):
            self._save()

    def _describe(self, columns: Sequence[ColumnBlock]) -> None:
        """Tell of what is recorded for the first time, for those who read the run without us."""
        fresh = [b for b in columns if b.ref not in self._described]
        if fresh:
            self._described |= {b.ref for b in fresh}
            self.writer.update(columns={b.ref: _about(self.metrics[b.metric], b.column) for b in fresh})

    def _complain(self) -> None:
        """One line, once, for each thing that keeps the run from being written."""
        problem = self.writer.problem
        if problem and ("problem", problem) not in self._said:
            self._said.add(("problem", problem))
            self._say(f"{problem} (training is not affected)")

    def _failed(self, metric: Metric, error: MetricError) -> None:
        del self.metrics[metric.id]
        self._warnings.append(f"{metric.id} is no longer recorded: {error}")
        self.writer.update(warnings=list(self._warnings))

    def _save(self) -> None:
        begin = time.thread_time()
        if self._engine is not None:
            self.writer.findings(self._engine.findings(), self._engine.state(), self._hash)
        self.writer.update(
            overhead=dict(self.overhead()),
            absent=[{"what": what, "why": why} for what, why in self.missing()],
            drops={"rows": self.dropped_rows} if self.dropped_rows else {},
            warnings=list(self._warnings),
        )
        self._saved, self._saving = time.monotonic(), time.thread_time() - begin

    def _announce(self, findings: list[Finding]) -> None:
        """One line the first time a rule finds something that is more than information."""
        for f in findings:
            if f.severity != "info" and (f.rule, "") not in self._said:
                self._said.add((f.rule, ""))
                first = plain(describe(f)).split(". ")[0].rstrip(".")  # the numbers and sources are in the run
                self._say(f"{f.severity} at step {f.first_step:,}: {first}")


def _about(metric: Metric, column: str) -> dict[str, str]:
    told = metric.column(column)
    return {
        "title": metric.title, "site": metric.site, "unit": told.unit, "doc": told.doc, "source": metric.source,
    }  # fmt: skip


def to_stderr(line: str) -> None:
    """Print one line of ours, in one write, where it does not mix with a program's results."""
    try:
        sys.stderr.write(f"monitor: {line}\n")
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        pass  # the user closed it, or there was none to begin with and it is None
