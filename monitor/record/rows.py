"""The rows of a recording: what sites emit goes into the open one, and closed ones go to the tail and to the writer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from monitor.record.flush import Taker
from monitor.record.ring import Ring, Values

#: Rows handed to the writer together, and the longest time (seconds) a row waits for the others.
BLOCK_ROWS, BLOCK_SECONDS = 100, 5.0


class OpenRow:
    """The row of the step under way, and the closed ones that have not been handed on.

    Args:
        device: where the training runs.
        flusher: takes the rows.
    """

    def __init__(self, device: torch.device, flusher: Taker) -> None:
        self._flusher = flusher
        self._ring = Ring(device, BLOCK_ROWS)
        self._emitted: dict[tuple[str, str], tuple[int, int]] = {}
        self._handed_on = time.perf_counter()

    def emit(
        self,
        epoch: int,
        reads: str,
        stats: Sequence[str],
        module: str,
        values: Values,
        merge: Sequence[str],
        at: slice,
        absent: Sequence[int],
    ) -> None:
        """Write the statistics of one module, as `Recorder.emit`; those of one ``epoch`` are merged."""
        span = self._ring.span(reads, module)
        if span is None:
            self._widen(reads, stats, (module,))
            span = self._ring.span(reads, module)
            assert span is not None
        if merge:
            before, count = self._emitted.get((reads, module), (-1, 0))
            if before == epoch:
                values = _merged(merge[at], self._ring.open(span, values)[at], values, count)
            else:
                count = 0
            self._emitted[(reads, module)] = (epoch, count + 1)
        self._ring.write(span, at, values)
        if absent:
            self._ring.blank(span, absent)

    def emit_many(self, reads: str, stats: Sequence[str], modules: Sequence[str], values: Values, at: slice) -> None:
        """Write the statistics of several modules, as `Recorder.emit_many`."""
        places = self._ring.places(reads, modules)
        if places is None:
            self._widen(reads, stats, modules)
            places = self._ring.places(reads, modules)
            assert places is not None
        self._ring.write_many(reads, places, at, values)

    def _widen(self, reads: str, stats: Sequence[str], modules: Sequence[str]) -> None:
        self.hand_on(wait=True)
        self._ring.widen(reads, stats, modules)
        self._flusher.layout(self._ring.layout)

    def close(self, step: int) -> None:
        """Close the row as that of ``step`` and begin the next; hand on the closed ones when it is time."""
        if self._ring.layout.segments:
            self._ring.commit(step)
            if self._ring.full or time.perf_counter() - self._handed_on > BLOCK_SECONDS:
                self.hand_on()
            else:
                self._drain()
        self._emitted.clear()

    def hand_on(self, wait: bool = False) -> None:
        """Give the closed rows to the writer: those that have arrived; the others follow.

        Args:
            wait: for those that the device has not copied yet.
        """
        self._ring.turn()
        self._drain(wait)
        self._handed_on = time.perf_counter()

    def _drain(self, wait: bool = False) -> None:
        blocks = self._ring.blocks
        while True:
            block = blocks[0]
            for step, payload in block.ready(wait):
                self._flusher.row(step, block.layout.number, payload)
            if len(blocks) == 1 or not block.complete:
                return
            self._flusher.take(blocks.popleft().raw())

    def move(self, device: torch.device) -> None:
        """Go on with rows on another device."""
        self.hand_on(wait=True)
        self._ring.move(device)


#: How statistics are joined, in the order in which `_merged` computes all of them.
_WAYS = ("sum", "mean", "last", "max", "min")


def _merged(merge: Sequence[str], old: Tensor | np.ndarray, new: Values, count: int) -> Values:
    """Statistics of ``count`` micro-batches and of one more."""
    if isinstance(old, np.ndarray):
        a, b = old, np.asarray(new, dtype=np.float32)
        with np.errstate(all="ignore"):
            ways = (a + b, (a * count + b) / (count + 1), b, np.maximum(a, b), np.minimum(a, b))
            return np.choose(_which(tuple(merge)), ways)
    a, b = old, torch.as_tensor(new, dtype=torch.float32, device=old.device)
    ways = torch.stack((a + b, (a * count + b) / (count + 1), b, torch.maximum(a, b), torch.minimum(a, b)))
    return ways.gather(0, _which_on(tuple(merge), old.device))[0]


@cache
def _which(merge: tuple[str, ...]) -> np.ndarray:
    """For each statistic the place of its way in `_WAYS`: ``(statistic,)``."""
    return np.array([_WAYS.index(way) for way in merge])


@cache
def _which_on(merge: tuple[str, ...], device: torch.device) -> Tensor:
    """The same on an accelerator: ``(1, statistic)``."""
    return torch.from_numpy(_which(merge)[None]).to(device, non_blocking=True)
