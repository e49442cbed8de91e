"""The rows being recorded: small buffers of float32, one row per step, no synchronisation.

Sites `emit` vectors of statistics into the open row; `commit` closes it. On a CPU a closed row can be read at once. On
an accelerator what the device computes is written there, and what the host knows stays on the host, as sending a number
up would wait for the device. Rows leave it in one non-blocking copy every `COPY_EVERY` steps into pinned memory, and
are read once the copy's event has passed; these are the steps in flight that a kill can cost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from monitor.block import ABSENT_BITS, Layout, RawBlock, Rows, Segment

#: Rows of one device-to-host copy on an accelerator: bounds what a kill can lose to twice this many steps.
COPY_EVERY = 8
#: Values of a block, 16 MiB: of very many tensors a block has fewer rows.
BLOCK_VALUES = 1 << 22
#: Tuples of modules whose places are remembered.
_REMEMBERED = 64
#: `ABSENT_BITS` as the signed integer that torch can write.
ABSENT_INT = int(np.int32(ABSENT_BITS.view(np.int32)))


#: Statistics to be written: a tensor of the training's device, or what the host knows: an array, numbers or its tensor.
Values = Tensor | np.ndarray | Sequence[float]


class Block:
    """Rows of one layout on their way to the writer.

    Args:
        device: where the training runs.
        capacity: rows that it has room for.
        layout: what stands where in a row.

    Attributes:
        steps: of the rows closed so far.
        host: ``(capacity, layout.size)`` float32: what the host knows; on a CPU that is everything.
        device: the same of what the device computes; None on a CPU.
    """

    def __init__(self, device: torch.device, capacity: int, layout: Layout) -> None:
        shape = capacity, max(1, layout.size)
        self.layout = layout
        self.capacity = capacity
        self.steps: list[int] = []
        self.host: Rows = np.full(shape, ABSENT_INT, np.int32).view(np.float32)
        self.device: Tensor | None = None
        if device.type != "cpu":
            self.device = torch.full(shape, ABSENT_INT, dtype=torch.int32, device=device).view(torch.float32)
            self._arriving = torch.empty(shape, dtype=torch.float32, pin_memory=True)
        self._copies: deque[tuple[int, torch.Event]] = deque()  # (rows copied so far, when), of those that are awaited
        self._copied = self._arrived = self._read = 0

    def copy(self) -> None:
        """Let the device send its closed rows that have not been sent."""
        begin, end = self._copied, len(self.steps)
        if self.device is not None and end > begin:
            self._arriving[begin:end].copy_(self.device[begin:end], non_blocking=True)
            event = torch.Event(self.device.device)
            event.record()
            self._copies.append((end, event))
            self._copied = end

    def ready(self, wait: bool = False) -> list[tuple[int, bytes]]:
        """Closed rows that can be read now and were not returned before: ``(step, float32 bytes)``.

        Args:
            wait: for the copies under way. Never in a step of the training.
        """
        begin, end = self._read, len(self.steps)
        if self.device is not None:
            if wait:
                self.copy()
            while self._copies and (wait or self._copies[0][1].query()):
                self._arrived, event = self._copies.popleft()
                if wait:
                    event.synchronize()
            end = self._arrived
            if end > begin:
                sent = self._arriving[begin:end].numpy()
                np.copyto(self.host[begin:end], sent, where=self.host[begin:end].view(np.uint32) == ABSENT_BITS)
        self._read = end
        return [(self.steps[i], self.host[i].tobytes()) for i in range(begin, end)]

    @property
    def complete(self) -> bool:
        """True once every closed row has been read."""
        return self._read == len(self.steps)

    def raw(self) -> RawBlock:
        """The closed rows, all of which have been read."""
        return RawBlock(self.layout, np.array(self.steps, dtype=np.int64), self.host[: len(self.steps)])


class Ring:
    """The open row, and the blocks of closed ones that have not been handed to the writer.

    Args:
        device: where the training runs.
        capacity: rows handed on together, at most.
    """

    def __init__(self, device: torch.device, capacity: int) -> None:
        self._most = capacity
        self.layout = Layout(0, ())
        self._where: dict[str, Segment] = {}
        self._index: dict[str, dict[str, int]] = {}
        self._spans: dict[tuple[str, str], slice] = {}
        # where modules stand that were asked for before, by the identity of a tuple that is kept for it
        self._found: dict[tuple[str, int], tuple[Sequence[str], slice | np.ndarray]] = {}
        self.blocks: deque[Block] = deque()  # the last one has the open row
        self._begin(device)

    def _begin(self, device: torch.device) -> None:
        """Begin a block; the open row is as it was."""
        self._device = device
        self.capacity = max(COPY_EVERY, min(self._most, BLOCK_VALUES // max(1, self.layout.size)))
        self._block = block = Block(device, self.capacity, self.layout)
        self.steps = block.steps
        self._host = block.host
        self.blocks.append(block)

    @property
    def full(self) -> bool:
        """True when the block has no room for another row."""
        return len(self.steps) >= self.capacity

    def turn(self) -> None:
        """Begin a new block if this one has closed rows, which are now on their way; the open row is carried over."""
        n, before = len(self.steps), self._block
        if not n:
            return
        before.copy()
        self._begin(self._device)
        if n < self.capacity:
            self._host[0] = before.host[n]
            if self._block.device is not None and before.device is not None:
                self._block.device[0].copy_(before.device[n])

    def widen(self, reads: str, stats: Sequence[str], modules: Sequence[str]) -> None:
        """Make room for a pass or for more modules of it. No row may be closed; the open one is carried over.

        Args:
            reads: id of the pass.
            stats: its statistics; must not change once known.
            modules: names to add.
        """
        old_layout, before = self.layout, self.blocks.pop()
        segments, offset = [], 0
        existing = {s.reads: s for s in old_layout.segments}
        for name in [*existing, *([reads] if reads not in existing else [])]:
            had = existing.get(name)
            have = had.modules if had else ()
            names = (*have, *dict.fromkeys(m for m in modules if m not in have)) if name == reads else have
            segment = Segment(name, had.stats if had else tuple(stats), names, offset)
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
        self._begin(self._device)
        for s in old_layout.segments:
            old, new = slice(s.offset, s.offset + s.size), self._where[s.reads].offset
            self._host[0, new : new + s.size] = before.host[0, old]
            if self._block.device is not None and before.device is not None:
                self._block.device[0, new : new + s.size].copy_(before.device[0, old])

    def move(self, device: torch.device) -> None:
        """Go on with rows on another device. No row may be closed; the open one is carried over."""
        before = self.blocks.pop()
        self._begin(device)
        self._host[0] = before.host[0]
        if before.device is not None:
            row = before.device[0]
            if self._block.device is not None:
                self._block.device[0].copy_(row)
            else:
                unknown = self._host[0].view(np.uint32) == ABSENT_BITS
                np.copyto(self._host[0], row.cpu().numpy(), where=unknown)

    def span(self, reads: str, module: str) -> slice | None:
        """Where the statistics of one module stand in a row; None if the layout has no place for them."""
        return self._spans.get((reads, module))

    def open(self, span: slice, values: Values) -> Tensor | np.ndarray:
        """``(statistic,)`` float32: what stands there in the open row, of the device or the host as ``values`` are."""
        n = len(self.steps)
        device = self._of_device(values)
        return self._host[n, span] if device is None else device[n][span]

    def _of_device(self, values: Values) -> Tensor | None:
        """The rows of the device if ``values`` are its, None if they are known to the host.

        Of a model that begins on a CPU and goes on elsewhere, what is elsewhere is waited for.
        """
        return self._block.device if isinstance(values, Tensor) and not values.is_cpu else None

    def write(self, span: slice, at: slice, values: Values) -> None:
        """Write ``values`` to the statistics ``at`` of one module in the open row."""
        n = len(self.steps)
        device = self._of_device(values)
        if device is None:
            with np.errstate(over="ignore"):  # beyond float32 is infinity, and infinity is a value
                self._host[n, span][at] = values.numpy(force=True) if isinstance(values, Tensor) else values
            return
        assert isinstance(values, Tensor)
        device[n][span][at].copy_(values, non_blocking=True)
        self._host[n, span].view(np.int32)[at] = ABSENT_INT

    def places(self, reads: str, modules: Sequence[str]) -> slice | np.ndarray | None:
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
        place = slice(at, at + len(modules)) if beside else np.array([index[m] for m in modules])
        if isinstance(modules, tuple) and len(modules) > 1:
            if len(self._found) >= _REMEMBERED:
                self._found.clear()
            self._found[(reads, id(modules))] = (modules, place)
        return place

    def write_many(self, reads: str, places: slice | np.ndarray, at: slice, values: Values) -> None:
        """Write ``(module, statistic)`` values to the statistics ``at`` of several modules of the open row."""
        n, s = len(self.steps), self._where[reads]
        shape = len(s.modules), len(s.stats)
        device = self._of_device(values)
        host = self._host[n, s.offset : s.offset + s.size].reshape(shape)
        if device is None:
            with np.errstate(over="ignore"):
                host[places, at] = values.numpy(force=True) if isinstance(values, Tensor) else values
            return
        assert isinstance(values, Tensor)
        target = device[n][s.offset : s.offset + s.size].view(shape)[:, at]
        if isinstance(places, slice):
            target[places].copy_(values, non_blocking=True)
        else:
            rows = torch.from_numpy(places).to(device.device, non_blocking=True)
            target.index_copy_(0, rows, values.to(target, non_blocking=True))
        host.view(np.int32)[places, at] = ABSENT_INT

    def blank(self, span: slice, stats: Sequence[int]) -> None:
        """Make single statistics of one module absent in the open row."""
        n, device = len(self.steps), self._block.device
        self._host[n, span].view(np.int32)[list(stats)] = ABSENT_INT
        if device is not None:
            bits = device[n][span].view(torch.int32)
            bits.masked_fill_(_among(tuple(stats), len(bits), device.device), ABSENT_INT)

    def commit(self, step: int) -> None:
        """Close the open row as ``step``; on an accelerator, start the copy when one is due."""
        self.steps.append(step)
        if len(self.steps) % COPY_EVERY == 0:
            self._block.copy()


@cache
def _among(stats: tuple[int, ...], count: int, device: torch.device) -> Tensor:
    """``(count,)`` bool on ``device``: True for those of ``stats``."""
    return torch.from_numpy(np.isin(np.arange(count), stats)).to(device, non_blocking=True)
