"""Rows of parts as arrays of step and module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from monitor.block import Steps
from monitor.metric import Array, Block, Mask
from monitor.store.parts import Points


def aligned(blocks: Mapping[str, Block]) -> Block:
    """Blocks of one name each as one block: over all their steps, and the modules that each of them has.

    Args:
        blocks: name -> a block with that name.
    """
    first = next(iter(blocks.values()))
    modules = tuple(m for m in first.modules if all(m in b.modules for b in blocks.values()))
    steps = np.unique(np.concatenate([b.steps for b in blocks.values()]))
    values: dict[str, Array] = {}
    has: dict[str, Mask] = {}
    for name, b in blocks.items():
        columns = [b.modules.index(m) for m in modules]
        values[name] = np.full((len(steps), len(modules)), np.nan)
        has[name] = np.zeros(values[name].shape, dtype=np.bool_)
        rows = np.searchsorted(steps, b.steps)
        values[name][rows], has[name][rows] = b[name][:, columns], b.has(name)[:, columns]
    return Block(steps, modules, values, has)


def stacked(chunks: Sequence[tuple[Steps, Array, Mask]], width: int) -> tuple[Steps, Array, Mask]:
    """What `dense` made of several parts as one; of two values for the same step the later part's stays."""
    if not chunks:
        return np.zeros(0, np.int64), np.zeros((0, width)), np.zeros((0, width), dtype=np.bool_)
    steps = np.concatenate([c[0] for c in chunks])
    if (np.diff(steps) > 0).all():  # parts follow one another, unless somebody meddled with them
        return steps, np.concatenate([c[1] for c in chunks]), np.concatenate([c[2] for c in chunks])
    steps = np.unique(steps)
    values, has = np.full((len(steps), width), np.nan), np.zeros((len(steps), width), dtype=np.bool_)
    for at, some, mask in chunks:
        rows = np.searchsorted(steps, at)
        values[rows] = np.where(mask, some, values[rows])
        has[rows] |= mask
    return steps, values, has


def dense(points: Points, place: npt.NDArray[np.intp], width: int) -> tuple[Steps, Array, Mask]:
    """Rows of one part as ``(step, module)``; ``place`` says which column a series has."""
    begins = np.flatnonzero(np.diff(points.series, prepend=-1))
    height = len(points.series) // len(begins)
    table = points.steps.reshape(len(begins), height) if height * len(begins) == len(points.series) else None
    even = table is not None and np.array_equal(begins, np.arange(len(begins)) * height)
    if table is not None and even and (table == table[0]).all() and (np.diff(table[0]) > 0).all():
        # the usual case, every series at the same steps, needs no search
        steps, columns = table[0], place[points.series[begins]]
        at, recorded = (slice(None), columns), points.values.reshape(table.shape).T
    else:
        steps, recorded = np.unique(points.steps), points.values
        at = np.searchsorted(steps, points.steps), place[points.series]
    values, has = np.full((len(steps), width), np.nan), np.zeros((len(steps), width), dtype=np.bool_)
    values[at], has[at] = recorded, True
    return steps, values, has
