"""The learning rate of every parameter group, as the optimizer used it in the step.

    lr = optimizer.param_groups[i]["lr"]    when the update was made

Healthy: what the schedule promises: a short rise, then constant or falling.

Unhealthy: 0 for a whole run or in one group (a schedule that ended, a group added late); steps in the curve where
there should be none (a schedule stepped twice, or per epoch instead of per step); a spike of the loss right after a
rise.

Source: definition.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import recorded


def compute(block: Block) -> Mapping[str, Result]:
    """The learning rate as it was recorded."""
    return {"lr": recorded(block, "lr")}


def oracle() -> Iterable[Case]:
    """Two groups."""
    lr = [[1e-3, 1e-4], [0, None], [nan, 1e-4]]
    yield Case({"lr": lr}, {"lr": lr}, "recorded values pass unchanged; 0 is a rate", modules=("group[0]", "group[1]"))


METRIC = Metric(
    id="learning_rate",
    title="Learning rate",
    site="update",
    columns=(Column("lr", "1", "learning rate of the group"),),
    compute=compute,
    source="definition",
    cost="nothing: a number that the optimizer holds",
    plot=Plot("lr", log=True),
    oracle=oracle,
    reads="learning_rate",
    doc=__doc__ or "",
)
