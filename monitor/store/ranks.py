"""Statistics of tensors of which several processes have parts: each writes those of its own, the first joins them.

    rank1/tail/…    rows of the process with rank 1: what it says of its parts, a frame a step, as in any tail

No process waits for another while it trains. The first one's writer thread, or a reader of its tail, takes what the
others have written of the same steps. A statistic that a process has not written of a step is absent there.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from monitor.block import ABSENT, ABSENT_BITS, RawBlock, Rows, Segment
from monitor.store.layout import TAIL, rank_name
from monitor.store.tail import read_tail

#: How statistics of two parts become those of both, by pass and statistic. Norms are added as squares.
WAYS: Mapping[str, Mapping[str, str]] = {
    "gradient": {"norm": "norm", "max_abs": "max", "nonfinite": "sum", "spikes": "sum", "spike_ratio": "max"},
    "update": {"update_norm": "norm", "param_norm": "norm"},
    "rounding": {"n": "sum", "asked": "sum", "lost": "sum", "still": "sum", "elements": "sum"},
    "distance": {"sumsq": "sum", "sumsq_var": "sum", "exact": "min"},
    "alignment": {"dot": "sum", "grad_norm": "norm", "param_norm": "norm"},
}
#: Seconds the writer thread waits for the others to write a step that the first has made.
PATIENCE = 2.0
#: More processes than this are not looked for.
MOST = 1 << 16

_Wide = npt.NDArray[np.float64]


def others_fact(attempt: int, ranks: Sequence[int]) -> dict[str, Any]:
    """What run.json says of the other processes that record parts in an attempt, as `others_of` reads it."""
    return {f"others_{attempt}": list(ranks)}


def others_of(info: Mapping[str, Any], attempt: int) -> tuple[int, ...]:
    """Ranks of the other processes that recorded parts in an attempt, as the run's run.json says."""
    given = info["facts"].get(f"others_{attempt}")
    ranks = given[:MOST] if isinstance(given, list) else ()
    return tuple(r for r in ranks if isinstance(r, int) and 1 <= r <= MOST)


def read_others(folder: Path, attempt: int, ranks: Sequence[int]) -> list[list[RawBlock]]:
    """The rows of these ranks, in order of steps; empty for one that has written nothing (or no longer)."""
    found = []
    for rank in ranks:
        segments = [s for s in read_tail(folder, rank) if s.attempt == attempt]
        found.append([b for s in segments for b in s.blocks])
    return found


def join(block: RawBlock, others: Sequence[Sequence[RawBlock]]) -> RawBlock:
    """The rows of the first rank with what the others say of the same steps.

    Args:
        block: its rows, which hold all passes.
        others: the rows of each other rank, which hold those of `WAYS` and only the modules that are parted. If one of
            them has none at all, nothing is known of the whole, and ``block`` stays as it is.

    Returns:
        Rows of the same layout. Exact for sums, norms, extremes and counts; a tensor so small that a process has
        nothing of it is what the others have.
    """
    if not others or not all(others):
        return block
    rows = block.rows.copy()
    for segment in block.layout.segments:
        ways = WAYS.get(segment.reads)
        parted = {m for blocks in others for b in blocks for m in _modules(b, segment.reads)}
        at = np.array([i for i, m in enumerate(segment.modules) if m in parted], dtype=np.intp)
        if ways is None or not len(at):
            continue
        part = rows[:, segment.offset : segment.offset + segment.size]
        shape = len(block.steps), len(segment.modules), len(segment.stats)
        whole = part.reshape(shape)[:, at]
        values, has = whole.astype(np.float64), whole.view(np.uint32) != ABSENT_BITS
        chosen = tuple(segment.modules[i] for i in at)
        for blocks in others:
            more, given, there = _of(blocks, block.steps, segment, chosen)
            with np.errstate(all="ignore"):
                for k, stat in enumerate(segment.stats):
                    both = _joined(ways[stat], values[:, :, k], more[:, :, k])
                    values[:, :, k] = np.where(there, both, values[:, :, k])
            has &= given
        joined = values.astype(np.float32)
        joined[~has] = ABSENT
        full = part.reshape(shape).copy()
        full[:, at] = joined
        rows[:, segment.offset : segment.offset + segment.size] = full.reshape(part.shape)
    return RawBlock(block.layout, block.steps, rows)


def _modules(block: RawBlock, reads: str) -> tuple[str, ...]:
    return next((s.modules for s in block.layout.segments if s.reads == reads), ())


def _of(
    blocks: Sequence[RawBlock], steps: npt.NDArray[np.int64], like: Segment, modules: Sequence[str]
) -> tuple[_Wide, npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """What one rank says of ``modules`` at ``steps``.

    Returns:
        ``(step, module, statistic)`` values, and whether they were recorded, or that there is no such part;
        ``(step, module)`` whether there is one.
    """
    shape = len(steps), len(modules), len(like.stats)
    values, has = np.zeros(shape), np.zeros(shape, dtype=np.bool_)
    there = np.zeros(shape[:2], dtype=np.bool_)
    for block in blocks:
        _, mine, its = np.intersect1d(steps, block.steps, assume_unique=True, return_indices=True)
        segment = next((s for s in block.layout.segments if s.reads == like.reads), None)
        known = () if segment is None else segment.modules
        to = np.array([i for i, m in enumerate(modules) if m in known], dtype=np.intp)
        has[mine] = True  # of what it has no part of, nothing is missing
        if segment is None or not len(mine):
            continue
        if segment.stats != like.stats:  # another version's
            has[np.ix_(mine, to)] = False
            continue
        place = {m: i for i, m in enumerate(segment.modules)}
        raw: Rows = block.rows[its, segment.offset : segment.offset + segment.size]
        raw = np.ascontiguousarray(raw).reshape(len(its), len(segment.modules), len(segment.stats))
        raw = raw[:, [place[m] for m in modules if m in place]]
        grid = np.ix_(mine, to)
        values[grid], there[grid] = raw, True
        has[grid] = raw.view(np.uint32) != ABSENT_BITS
    return values, has, there


def _joined(way: str, a: _Wide, b: _Wide) -> _Wide:
    if way == "norm":
        return np.sqrt(a * a + b * b)
    if way == "sum":
        return a + b
    return np.maximum(a, b) if way == "max" else np.minimum(a, b)


class Others:
    """The other processes of a run, as the writer thread of the first sees them.

    Args:
        folder: the run folder.
        attempt: the attempt that is being recorded.
        ranks: of the others.

    Attributes:
        silent: ranks of which nothing was found; while there are any, nothing is joined.
        alone: the last step at which nothing was joined; None if there was none.
        behind: of ranks that had written before: the last step that they had, and the last for which they were waited
            for in vain; what they have parts of is absent in between.
        last: the last step for which they were asked.
    """

    def __init__(self, folder: Path, attempt: int, ranks: Sequence[int]) -> None:
        self._folder, self._attempt, self._ranks = folder, attempt, ranks
        self._patience = PATIENCE
        self.silent: list[int] = []
        self.alone: int | None = None
        self.behind: dict[int, tuple[int, int]] = {}
        self.last = -1
        self._heard: dict[int, list[RawBlock]] = {}  # the newest of each rank

    def join(self, block: RawBlock) -> RawBlock:
        """`join` with what the others have written, after waiting for them a little."""
        last, end = int(block.steps[-1]), time.monotonic() + self._patience
        while True:
            found = zip(self._ranks, read_others(self._folder, self._attempt, self._ranks), strict=True)
            # of one that has fallen silent it is still known of what it has parts
            rows = {r: blocks or self._heard.get(r, []) for r, blocks in found}
            ends = {r: int(blocks[-1].steps[-1]) for r, blocks in rows.items() if blocks}
            behind = [r for r in self._ranks if ends.get(r, -1) < last]
            if not behind or time.monotonic() >= end:
                break
            time.sleep(0.02)
        self._heard |= {r: blocks[-1:] for r, blocks in rows.items() if blocks}
        self.silent = [r for r in self._ranks if r not in self._heard]
        if self.silent:
            self.alone = last
        self.last = last
        for r in behind:
            if r in ends:
                self.behind[r] = self.behind.get(r, (ends[r],))[0], last
        self._patience = 0.0 if behind else PATIENCE  # one that has died is not waited for again and again
        return join(block, [*rows.values()])

    def drop(self, last: int, ended: bool = False) -> None:
        """Remove the segments whose steps all stand in parts.

        Args:
            last: the last step that parts hold.
            ended: also the ones that may still be open: no more is recorded.
        """
        for rank in self._ranks:
            segments = [s for s in read_tail(self._folder, rank) if s.attempt == self._attempt]
            for s in segments if ended else segments[:-1]:
                if all(int(b.steps[-1]) <= last for b in s.blocks):
                    s.path.unlink(missing_ok=True)
            if ended:
                for place in (self._folder / rank_name(rank) / TAIL, self._folder / rank_name(rank)):
                    with suppress(OSError):  # not empty, or not there
                        place.rmdir()
