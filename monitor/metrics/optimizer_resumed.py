"""Whether an optimizer goes on where it was when a run is resumed.

    counted = updates that the optimizer itself has counted for a parameter,   since = updates since this attempt began

of each optimizer, in the first ten steps of an attempt that goes on from an earlier one (``resume=True``). Absent in
runs that begin at step 0, and for optimizers that count nothing (SGD).

Healthy: counted above since, by the number of steps of the attempts before.

Unhealthy: counted equal to since: model and step came from a checkpoint, the optimizer's state did not. Its momentum
and second moments hold nothing; bias correction takes care of their size, so that Adam's first updates move every
element by the whole learning rate, whatever its gradient.

Source: definition.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import recorded


def compute(block: Block) -> Mapping[str, Result]:
    """The numbers as they were recorded."""
    return {name: recorded(block, name) for name in ("counted", "since")}


def oracle() -> Iterable[Case]:
    """The third update after one that knows of 500; of one that knows of none; not recorded."""
    seen = {"counted": [[503], [3], [None], [nan]], "since": [[3], [3], [None], [1]]}
    yield Case(seen, seen, "recorded values pass unchanged")


METRIC = Metric(
    id="optimizer_resumed",
    title="Optimizer of a resumed run",
    site="update",
    columns=(
        Column("counted", "count", "updates that the optimizer has counted"),
        Column("since", "count", "updates since this attempt began"),
    ),
    compute=compute,
    source="definition",
    cost="nothing: a number that the optimizer holds, in the first ten steps of a resumed run",
    plot=Plot("counted"),
    oracle=oracle,
    reads="optimizer_resumed",
    doc=__doc__ or "",
)
