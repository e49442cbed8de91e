"""How many updates the oldest optimizer has made.

    updates = most updates that an optimizer object has made since it was first seen, the one of this step included
    remembers = 1 if that optimizer keeps a value for each element of a parameter (momentum, second moment), else 0

of the optimizers that made an update since the last record: in this step among the first ten, later in it and the ten
before it, so that one that is made anew for eleven updates is not taken for one that is made anew for each. A run that
goes on from a checkpoint counts from 1 again.

Healthy: one more with every step.

Unhealthy: 1 for ever with remembers 1: an optimizer is made for every update, and momentum and second moments hold one
gradient only. Falling back to 1 now and then: made anew every epoch, or a phase of the training has begun.

Source: definition.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import recorded


def compute(block: Block) -> Mapping[str, Result]:
    """The numbers as they were recorded."""
    return {name: recorded(block, name) for name in ("updates", "remembers")}


def oracle() -> Iterable[Case]:
    """The eleventh update of an Adam; not recorded."""
    seen = {"updates": [[11], [None], [nan]], "remembers": [[1], [None], [0]]}
    yield Case(seen, seen, "recorded values pass unchanged")


METRIC = Metric(
    id="optimizer_age",
    title="Age of the optimizer",
    site="update",
    columns=(
        Column("updates", "count", "updates that the oldest optimizer has made"),
        Column("remembers", "1", "1 if it keeps something of earlier gradients"),
    ),
    compute=compute,
    source="definition",
    cost="nothing: a number that is counted anyway, at every eleventh step",
    plot=Plot("updates"),
    oracle=oracle,
    reads="optimizer_age",
    doc=__doc__ or "",
)
