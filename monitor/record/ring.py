"""The rows being recorded: a small float32 buffer on the training device, one row per step, no synchronisation.

Sites `emit` vectors of statistics into the open row; `commit` closes it. On the CPU a closed row can be read at once.
On an accelerator rows leave in one non-blocking copy every `COPY_EVERY` steps into pinned memory, and are read once the
copy's event has passed; these are the steps in flight that a kill can cost.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from monitor.block import ABSENT_BITS, Layout, RawBlock, Rows, Segment

#: Rows of one device-to-host copy on an accelerator: bounds what a kill can lose to twice this many steps.
COPY_EVERY = 8
#: Tuples of modules whose places are remembered.
_REMEMBERED = 64
#: `ABSENT_BITS` as the signed integer that torch can write.
ABSENT_INT = int(np.int32(ABSENT_BITS.view(np.int32)))


#: Statistics to be written: a tensor of the training's device; on a CPU also an array or numbers.
Values = Tensor | np.ndarray | Sequence[float]


class Ring:
    """Rows of statistics that have not yet been handed to the writer.

    Args:
        device: where the training runs.
        block: rows handed on together.
    """

    def __init__(self, device: torch.device, block: int) -> None:
        self.device = device
        self.on_cpu = device.type == "cpu"
        self.capacity = block
        self.layout = Layout(0, ())
        self._where: dict[str, Segment] = {}
        self._index: dict[str, dict[str, int]] = {}
        self._spans: dict[tuple[str, str], slice] = {}
        # where modules stand that were asked for before, by the identity of a tuple that is kept for it
        self._found: dict[tuple[str, int], tuple[Sequence[str], slice | list[int]]] = {}
        self._begin_block()

    def _begin_block(self) -> None:
        self.steps: list[int] = []
        bits = torch.full((self.capacity, max(1, self.layout.size)), ABSENT_INT, dtype=torch.int32, device=self.device)
        self._rows = bits.view(torch.float32)
        self._array = self._rows.numpy() if self.on_cpu else None  # the same memory
        self._host: Tensor | None = None
        self._copied: list[tuple[int, torch.cuda.Event]] = []  # (rows copied so far, when)
        if not self.on_cpu:
            self._host = torch.empty(self._rows.shape, dtype=torch.float32, pin_memory=True)
        self._read = 0

    @property
    def full(self) -> bool:
        """True when the block has no room for another row."""
        return len(self.steps) >= self.capacity

    def widen(self, reads: str, stats: Sequence[str], modules: Sequence[str]) -> RawBlock | None:
        """Make room for a pass or for more modules of it.

        Args:
            reads: id of the pass.
            stats: its statistics; must not change once known.
            modules: names to add.

        Returns:
            The closed rows under the old layout, which must be handed on; None if there were none. The open row is
            carried over.
        """
        done = self.take(wait=True)
        old_layout, old_row = self.layout, self._rows[0].clone()
        segments, offset = [], 0
        existing = {s.reads: s for s in old_layout.segments}
        for name in [*existing, *([reads] if reads not in existing else [])]:
            before = existing.get(name)
            have = before.modules if before else ()
            names = (*have, *dict.fromkeys(m for m in modules if m not in have)) if name == reads else have
            segment = Segment(name, before.stats if before else tuple(stats), names, offset)
            segments.append(segment)
            offset += segment.size
        self.layout = Layout(old_layout.number + 1, tuple(segments))
        self._where = {s.reads: s for s in segments}
        self._index = {s.reads: {m: i for i, m in enumerate(s.modules)} for s in segments}
        self._spans = {
            (s.reads, m): slice(s.offset + i * len(s.stats), s.offset + (i + 1) * len(s.stats))
            for s in segments
            for i, m in enumerate(s.modules)
        }
        self._found.clear()
        self._begin_block()
        row = self._rows[0]
        for s in old_layout.segments:
            at = self._where[s.reads].offset
            row[at : at + s.size] = old_row[s.offset : s.offset + s.size]
        return done

    def move(self, device: torch.device) -> None:
        """Go on with rows on another device. The caller has taken the block; the open row is carried over."""
        open_row = self._rows[len(self.steps)].to(device)
        self.device, self.on_cpu = device, device.type == "cpu"
        self._begin_block()
        self._rows[0].copy_(open_row)

    def span(self, reads: str, module: str) -> slice | None:
        """Where the statistics of one module stand in a row; None if the layout has no place for them."""
        return self._spans.get((reads, module))

    def open(self, span: slice) -> Tensor:
        """``(statistic,)`` float32: what stands there in the open row; writing to it records."""
        return self._rows[len(self.steps)][span]

    def write(self, span: slice, at: slice, values: Values) -> None:
        """Write ``values`` to the statistics ``at`` of one module in the open row."""
        if self._array is None:
            fresh = torch.as_tensor(values, dtype=torch.float32, device=self.device)
            self.open(span)[at].copy_(fresh, non_blocking=True)
            return
        with np.errstate(over="ignore"):  # beyond float32 is infinity, and infinity is a value
            self._array[len(self.steps), span][at] = values.numpy() if isinstance(values, Tensor) else values

    def places(self, reads: str, modules: Sequence[str]) -> slice | list[int] | None:
        """Row numbers of ``modules`` in the segment of a pass: a slice if they stand side by side in this order.

        The answer is remembered for a tuple, so that a caller who gives the same one at every step does not pay twice.
        None if the layout has no place for one of them.
        """
        known = self._found.get((reads, id(modules)))
        if known is not None:
            return known[1]
        index = self._index.get(reads, {})
        if not all(m in index for m in modules):
            return None
        at = index[modules[0]]
        beside = self._where[reads].modules[at : at + len(modules)] == tuple(modules)
        place = slice(at, at + len(modules)) if beside else [index[m] for m in modules]
        if isinstance(modules, tuple) and len(modules) > 1:
            if len(self._found) >= _REMEMBERED:
                self._found.clear()
            self._found[(reads, id(modules))] = (modules, place)
        return place

    def write_many(self, reads: str, places: slice | list[int], at: slice, values: Values) -> None:
        """Write ``(module, statistic)`` values to the statistics ``at`` of several modules of the open row."""
        s = self._where[reads]
        shape = len(s.modules), len(s.stats)
        if self._array is None:
            target = self.open(slice(s.offset, s.offset + s.size)).view(shape)[:, at]
            fresh = torch.as_tensor(values, dtype=torch.float32, device=self.device)
            if isinstance(places, list):
                target.index_copy_(0, torch.tensor(places, device=self.device), fresh)
            else:
                target[places].copy_(fresh, non_blocking=True)
            return
        with np.errstate(over="ignore"):
            row = self._array[len(self.steps), s.offset : s.offset + s.size].reshape(shape)
            row[places, at] = values.numpy() if isinstance(values, Tensor) else values

    def blank(self, span: slice, stats: Sequence[int]) -> None:
        """Make single statistics of one module absent in the open row."""
        self.open(span).view(torch.int32)[list(stats)] = ABSENT_INT

    def commit(self, step: int) -> None:
        """Close the open row as ``step``; on an accelerator, start the copy when one is due."""
        self.steps.append(step)
        if not self.on_cpu and (self.full or len(self.steps) % COPY_EVERY == 0):
            self._copy()

    def _copy(self) -> None:
        begin = self._copied[-1][0] if self._copied else 0
        end = len(self.steps)
        if self._host is not None and end > begin:
            self._host[begin:end].copy_(self._rows[begin:end], non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._copied.append((end, event))

    def ready(self, wait: bool = False) -> list[tuple[int, bytes]]:
        """Closed rows that can be read now and were not returned before: ``(step, float32 bytes)``.

        Args:
            wait: wait for copies under way (only when a block is taken or the run ends, never in a step).
        """
        if self.on_cpu:
            end, source = len(self.steps), self._rows
        else:
            end, source = self._read, self._host
            for upto, event in self._copied:
                if wait:
                    event.synchronize()
                if upto > end and event.query():
                    end = upto
        if source is None or end <= self._read:
            return []
        array = source.numpy()
        found = [(self.steps[i], array[i].tobytes()) for i in range(self._read, end)]
        self._read = end
        return found

    @property
    def settled(self) -> bool:
        """True when taking the block would not wait for the device."""
        if self.on_cpu:
            return True
        return bool(self._copied) and self._copied[-1][0] == len(self.steps) and self._copied[-1][1].query()

    def take(self, wait: bool = False) -> RawBlock | None:
        """Hand over the closed rows and begin a new block. The caller reads `ready` first.

        Args:
            wait: on an accelerator, first copy what is left and wait for it.
        """
        n = len(self.steps)
        if n == 0:
            return None
        if not self.on_cpu and wait:
            self._copy()
            for _, event in self._copied:
                event.synchronize()
        source = self._rows if self.on_cpu else self._host
        rows: Rows = source.numpy()[:n] if source is not None else np.zeros((0, 0), dtype=np.float32)
        block = RawBlock(self.layout, np.array(self.steps, dtype=np.int64), rows)
        open_row = self._rows[n].clone() if n < self.capacity else None
        self._begin_block()
        if open_row is not None:
            self._rows[0].copy_(open_row)
        return block
