"""Rows of raw statistics, and the one place that turns them into the columns of the metrics.

While recording, one step is one row of float32: the statistics of every pass for every module, side by side. A `Layout`
says what stands where. The same rows lie in the crash-safe tail, so a reader evaluates them with the same code as the
writer thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from monitor.errors import MetricError
from monitor.metric import Array, Block, Mask, Metric

#: Bits of the float32 NaN that means "nothing was recorded here". Arithmetic yields NaNs with other payloads, so a
#: recorded NaN stays a value.
ABSENT_BITS = np.uint32(0x7FC0DEAD)
ABSENT = ABSENT_BITS.view(np.float32)

Rows = npt.NDArray[np.float32]
Steps = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Segment:
    """Where the statistics of one pass stand in a row: ``len(modules) x len(stats)`` values from ``offset`` on."""

    reads: str
    stats: tuple[str, ...]
    modules: tuple[str, ...]
    offset: int

    @property
    def size(self) -> int:
        """Number of float32 values."""
        return len(self.stats) * len(self.modules)


@dataclass(frozen=True)
class Layout:
    """What stands where in a row. A new module or pass makes a new layout with the next ``number``."""

    number: int
    segments: tuple[Segment, ...]

    @property
    def size(self) -> int:
        """Number of float32 values in a row."""
        return sum(s.size for s in self.segments)

    def to_json(self) -> dict[str, Any]:
        """Plain data, for the tail."""
        return {
            "number": self.number,
            "segments": [
                {"reads": s.reads, "stats": s.stats, "modules": s.modules, "offset": s.offset} for s in self.segments
            ],
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Layout:
        """The layout that `to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: if ``data`` is something else.
        """
        segments = tuple(
            Segment(str(s["reads"]), tuple(map(str, s["stats"])), tuple(map(str, s["modules"])), int(s["offset"]))
            for s in data["segments"]
        )
        return Layout(int(data["number"]), segments)


@dataclass(frozen=True)
class RawBlock:
    """Recorded rows of one layout: ``steps`` ``(step,)`` int64, ``rows`` ``(step, layout.size)`` float32."""

    layout: Layout
    steps: Steps
    rows: Rows


@dataclass(frozen=True)
class ColumnBlock:
    """Recorded values of one column of one metric: ``values`` and ``has`` are ``(step, module)``."""

    metric: str
    column: str
    steps: Steps
    modules: tuple[str, ...]
    values: Array
    has: Mask

    @property
    def ref(self) -> str:
        """The column's public name, ``"metric.column"``."""
        return f"{self.metric}.{self.column}"


def evaluate(
    raw: RawBlock, metrics: Iterable[Metric], failed: Callable[[Metric, MetricError], None] | None = None
) -> list[ColumnBlock]:
    """The columns of every measured metric whose pass is in ``raw``.

    Args:
        raw: rows as they were recorded.
        metrics: definitions; derived ones are skipped.
        failed: told of a metric whose formula fails; the others go on. Default: the error is raised.

    Returns:
        One `ColumnBlock` per column; steps at which nothing was recorded have ``has`` False.

    Raises:
        MetricError: naming the metric, if its formula fails or answers with a wrong shape and ``failed`` is not given.
    """
    wanted = [m for m in metrics if not m.derived]
    found: list[ColumnBlock] = []
    for segment in raw.layout.segments:
        block: Block | None = None
        for m in wanted:
            if m.reads == segment.reads:
                block = block or _block(raw, segment)
                try:
                    found.extend(apply(m, block))
                except MetricError as e:
                    if failed is None:
                        raise
                    failed(m, e)
    return found


def _block(raw: RawBlock, segment: Segment) -> Block:
    n, modules = len(segment.stats), len(segment.modules)
    part = np.ascontiguousarray(raw.rows[:, segment.offset : segment.offset + segment.size])
    part = part.reshape(len(raw.steps), modules, n)
    absent = part.view(np.uint32) == ABSENT_BITS
    wide = part.astype(np.float64)
    return Block(
        raw.steps,
        segment.modules,
        {s: wide[:, :, i] for i, s in enumerate(segment.stats)},
        {s: ~absent[:, :, i] for i, s in enumerate(segment.stats)},
    )


def apply(m: Metric, block: Block) -> list[ColumnBlock]:
    """One metric's columns from the block its formula reads.

    Args:
        m: the definition.
        block: the statistics of its pass, or the columns it needs.

    Returns:
        One `ColumnBlock` per column the formula answered with. A column without a mask of its own is recorded wherever
        any of the block's values is.

    Raises:
        MetricError: naming the metric, the column and what was received.
    """
    anything = np.zeros((len(block.steps), len(block.modules)), dtype=np.bool_)
    for name in block.names:
        anything |= block.has(name)
    try:
        with np.errstate(all="ignore"):
            answer = m.compute(block)
    except Exception as e:
        raise MetricError(f"metric {m.id}: its formula raised {type(e).__name__}: {e}") from e
    found = []
    for c in m.columns:
        if c.name not in answer:
            raise MetricError(f"metric {m.id}: its formula gave {sorted(answer)}, expected a column {c.name!r}")
        result = answer[c.name]
        values, mask = result if isinstance(result, tuple) else (result, None)
        values = np.asarray(values, dtype=np.float64)
        if values.ndim == 1:
            modules: tuple[str, ...] = ("",)
            values = values[:, None]
            has = np.asarray(anything.any(axis=1) if mask is None else mask).reshape(values.shape)
        else:
            modules = block.modules
            has = anything if mask is None else mask
        if values.shape != (len(block.steps), len(modules)) or has.shape != values.shape:
            shape = len(block.steps), len(modules)
            raise MetricError(f"metric {m.id}: column {c.name!r} has shape {values.shape}, expected {shape}")
        found.append(ColumnBlock(m.id, c.name, block.steps, modules, values, has))
    return found
