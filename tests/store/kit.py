"""A recorder of three small metrics, with what it recorded in a plain dict to compare with."""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

import monitor.metrics
from monitor.block import ABSENT_BITS, Layout, RawBlock, Segment, evaluate
from monitor.metric import load_metrics
from monitor.store.run import Run
from monitor.store.writer import RunWriter

DEFINITIONS = Path(__file__).with_name("definitions")

#: (ref, module) -> step -> value
Recorded = dict[tuple[str, str], dict[int, float]]


#: Thresholds at which a few hundred rows pass through every kind of part.
SMALL = {
    "writer.FLUSH_STEPS": 12,
    "writer.FAN": 3,
    "writer.LARGE_ROWS": 500,
    "writer.LARGE_STEPS": 60,
    "parts.ROW_GROUP": 64,
    "parts._BATCH": 16,
}


def use_definitions() -> None:
    """Make the three metrics beside this file the only ones; in a test a fixture does it."""
    monitor.metrics.__path__ = [str(DEFINITIONS)]


def make_layout(modules: Sequence[str] = ("x", "y"), number: int = 0) -> Layout:
    """A row of ``1 + 2 * len(modules)`` numbers: t_whole.value, then t_pair.a and t_pair.b of each module."""
    return Layout(number, (Segment("whole", ("value",), ("",), 0), Segment("pair", ("a", "b"), tuple(modules), 1)))


def series_of(layout: Layout) -> list[tuple[str, str]]:
    """The series in the order of a row."""
    modules = layout.segments[1].modules
    return [("t_whole.value", ""), *((f"t_pair.{c}", m) for m in modules for c in ("a", "b"))]


def value_at(step: int, place: int) -> float:
    """A number that tells its step and place in the row."""
    return float(np.float32(step + place / 16))


class Recorder:
    """What `monitor.record` does around a writer, without torch.

    Args:
        writer: of a run.
        layout: of the first rows.
        every: rows in a block.
        threaded: hand blocks to a thread, as a recorder does, instead of writing them at once.
    """

    def __init__(self, writer: RunWriter, layout: Layout, every: int = 4, threaded: bool = False) -> None:
        self.writer, self.every = writer, every
        self.recorded: Recorded = {}
        self._steps: list[int] = []
        self._rows: list[np.ndarray] = []
        self._queue: queue.SimpleQueue[RawBlock | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True) if threaded else None
        if self._thread:
            self._thread.start()
        self.layout(layout)

    def layout(self, layout: Layout) -> None:
        self.hand_over()
        self._layout = layout
        self.writer.tail.layout(layout)

    def step(self, step: int, values: Mapping[int, float] | None = None) -> None:
        """Record a row. ``values``: place -> value, absent where missing; `value_at` everywhere without."""
        if values is None:
            values = {i: value_at(step, i) for i in range(self._layout.size)}
        row = np.full(self._layout.size, ABSENT_BITS, dtype=np.uint32).view(np.float32)
        for place, value in values.items():
            row[place] = value
            self.recorded.setdefault(series_of(self._layout)[place], {})[step] = float(row[place])
        self.writer.tail.row(step, self._layout.number, row.tobytes())
        self._steps.append(step)
        self._rows.append(row)
        if len(self._steps) >= self.every:
            self.hand_over()

    def hand_over(self) -> None:
        """Give what was recorded to the writer."""
        if not self._steps:
            return
        raw = RawBlock(self._layout, np.array(self._steps, dtype=np.int64), np.stack(self._rows))
        self.writer.tail.rotate(self._steps[-1] + 1)
        self._steps, self._rows = [], []
        if self._thread:
            self._queue.put(raw)
        else:
            self._write(raw)

    def close(self) -> None:
        self.hand_over()
        if self._thread:
            self._queue.put(None)
            self._thread.join()
        self.writer.close("finished")

    def _work(self) -> None:
        while (raw := self._queue.get()) is not None:
            self._write(raw)

    def _write(self, raw: RawBlock) -> None:
        self.writer.append(evaluate(raw, load_metrics().values()))
        self.writer.flush()


def read_back(run: Run, attempt: int | None = None) -> Recorded:
    """Everything ``run`` holds, in the form of `Recorder.recorded`."""
    found: Recorded = {}
    for metric, columns in run.metrics().items():
        for ref in (f"{metric}.{c}" for c in columns):
            block = run.block(ref, attempt=attempt)
            for i, module in enumerate(block.modules):
                has = block.has(ref)[:, i]
                if has.any():
                    pairs = zip(block.steps[has].tolist(), block[ref][has, i].tolist(), strict=True)
                    found[ref, module] = dict(pairs)
    return found


def same(left: Recorded, right: Recorded) -> bool:
    """Equality in which NaN equals NaN."""
    return left.keys() == right.keys() and all(
        list(left[k]) == list(right[k])
        and np.array_equal(list(left[k].values()), list(right[k].values()), equal_nan=True)
        for k in left
    )
