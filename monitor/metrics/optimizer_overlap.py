"""Parameters that two optimizers have in common, and whether both change them with the gradient of one backward.

    shared = parameters that this optimizer and one that made an update before it in the step both have
    twice = 1 if their gradients were the same, bit for bit, and both updates changed them, else 0

of up to 64 evenly spaced elements of three such parameters, for each optimizer but the first of a step. Absent where
optimizers have nothing in common, and of one that works through another, as a wrapper does.

Healthy: absent, or twice 0: each of the optimizers has a backward of its own, as where two losses train one encoder in
turn.

Unhealthy: twice 1: parameters are updated twice by every step, each time with the whole gradient.

Source: definition.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import recorded


def compute(block: Block) -> Mapping[str, Result]:
    """The numbers as they were recorded."""
    return {name: recorded(block, name) for name in ("shared", "twice")}


def oracle() -> Iterable[Case]:
    """Ten parameters twice; a backward of its own; not recorded."""
    seen = {"shared": [[10], [10], [None], [nan]], "twice": [[1], [0], [None], [0]]}
    yield Case(seen, seen, "recorded values pass unchanged", modules=("optimizer[1]",))


METRIC = Metric(
    id="optimizer_overlap",
    title="Parameters of two optimizers",
    site="update",
    columns=(
        Column("shared", "count", "parameters that another optimizer of the step has too"),
        Column("twice", "1", "1 if both change them with the same gradient"),
    ),
    compute=compute,
    source="definition",
    cost="at every 29th step, where optimizers have parameters in common: 192 elements of gradients and values",
    plot=Plot("twice"),
    oracle=oracle,
    reads="optimizer_overlap",
    doc=__doc__ or "",
)
