"""Blocks for the tests of metrics: from an oracle's case, from random numbers, cut, permuted, with holes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from monitor.metric import Array, Block, Case, Mask, Metric


def values_and_mask(data: object) -> tuple[Array, Mask]:
    """Numbers of a case and where there are any; None, "nothing was recorded", becomes NaN and False."""
    raw = np.array(data, dtype=object)
    has = np.array([x is not None for x in raw.flat], dtype=np.bool_).reshape(raw.shape)
    return np.array([np.nan if x is None else x for x in raw.flat], dtype=np.float64).reshape(raw.shape), has


def case_block(case: Case) -> Block:
    """The block a case describes: a single number stands for one step and every module."""
    parts = {name: values_and_mask(data) for name, data in case.stats.items()}
    steps = max(v.shape[0] if v.ndim else 1 for v, _ in parts.values())
    shape = (steps, len(case.modules))
    return Block(
        np.arange(steps, dtype=np.int64),
        case.modules,
        {name: np.broadcast_to(v, shape).copy() for name, (v, _) in parts.items()},
        {name: np.broadcast_to(h, shape).copy() for name, (_, h) in parts.items()},
    )


def stats_of(m: Metric) -> list[str]:
    """The statistics (or needed columns) a metric's formula reads, as its own oracle lists them."""
    return sorted({name for case in m.oracle() for name in case.stats})


def random_block(m: Metric, steps: int = 130, modules: Sequence[str] = ("a", "b", "c"), seed: int = 0) -> Block:
    """Positive numbers, counts among them, with a hole in every ninth cell."""
    rng = np.random.default_rng(seed)
    shape = (steps, len(modules))
    values: dict[str, Array] = {}
    has: dict[str, Mask] = {}
    for name in stats_of(m):
        counted = name in ("n", "classes")
        values[name] = rng.integers(2, 50, shape).astype(float) if counted else rng.lognormal(size=shape)
        has[name] = rng.random(shape) > 1 / 9
        values[name][~has[name]] = np.nan
    return Block(np.arange(steps, dtype=np.int64) + 7, tuple(modules), values, has)


def copy(block: Block, values: Mapping[str, Array], has: Mapping[str, Mask] | None = None) -> Block:
    """The block with some statistics, and perhaps where they were recorded, replaced."""
    all_has = {name: block.has(name) for name in block.names} | dict(has or {})
    return Block(block.steps, block.modules, {name: values.get(name, block[name]) for name in block.names}, all_has)


def select(block: Block, steps: slice = slice(None), modules: Sequence[int] | None = None) -> Block:
    """Some steps, and some modules in the order given."""
    at = list(range(len(block.modules))) if modules is None else list(modules)
    return Block(
        block.steps[steps],
        tuple(block.modules[i] for i in at),
        {name: block[name][steps][:, at] for name in block.names},
        {name: block.has(name)[steps][:, at] for name in block.names},
    )
