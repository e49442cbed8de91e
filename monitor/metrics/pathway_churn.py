"""Share of the experts of the same tokens that a router has exchanged since it was last looked at.

    churn = |chosen then, not now| / |chosen then|

over the tokens of the first batch of the run in evaluation mode, where the k experts of largest probability count as
chosen (a bias on the choice or a limit to groups of experts is left out). ``steps`` is how long ago the last look was:
a larger distance lets more change. ``lr_part`` is the learning rate now over the largest at any look so far, both of
the optimizer's first group: what changes while the learning rate is high is no surprise.

Healthy: high at first and falling, to a few percent when the learning rate has come down.

Unhealthy: late in training still as high as early on, while the loss is flat: the router keeps reshuffling tokens,
and each expert keeps learning what it will not be asked for.

Source: definition; Dai et al. (2022), StableMoE, arXiv 2204.08396, for the fluctuation of routing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import per, recorded


def compute(block: Block) -> Mapping[str, Result]:
    """Exchanged over assigned."""
    return {
        "churn": per(block, "changed", "assigned"),
        "steps": recorded(block, "steps"),
        "lr_part": recorded(block, "lr_part"),
    }


def oracle() -> Iterable[Case]:
    """A quarter; nothing assigned; not finite; nothing."""
    yield Case(
        {
            "changed": [[32], [0], [nan], [None]],
            "assigned": [[128], [0], [128], [None]],
            "steps": [[50], [1], [1], [None]],
            "lr_part": [[0.1], [1], [1], [None]],
        },
        {
            "churn": [[0.25], [None], [nan], [None]],
            "steps": [[50], [1], [1], [None]],
            "lr_part": [[0.1], [1], [1], [None]],
        },
        "32 of 128 is a quarter; of nothing there is no share",
        modules=("router",),
    )


METRIC = Metric(
    id="pathway_churn",
    title="Pathway churn",
    site="router",
    columns=(
        Column("churn", "fraction", "assignments of the same tokens that changed since the last look"),
        Column("steps", "steps", "since the last look"),
        Column("lr_part", "fraction", "learning rate of the optimizer's first group over the largest at a look so far"),
    ),
    compute=compute,
    source="definition; arXiv 2204.08396 sec. 2",
    cost="with pathway_distance: one top-k of the probabilities",
    plot=Plot("churn"),
    oracle=oracle,
    reads="pathway_churn",
    doc=__doc__ or "",
)
