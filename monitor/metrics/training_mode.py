"""How much of the model was in evaluation mode while it was trained.

    share = modules in eval() / modules,   left = modules in eval() that were in train() earlier in the run

over the modules that compute something else in training than in evaluation: dropout that drops something, recurrent
and attention layers with a dropout of their own, random slopes, and normalisations that keep averages over batches
(BatchNorm). Dropout that a forward calls as a function is not seen. Of several forwards in a step, the one counts with
the fewest in evaluation. ``left`` is 0 unless the model that was called is in evaluation mode itself, all its
parameters that were trained still are, and it was called in training mode before; so a normalisation that is frozen
on purpose is not in it.

Healthy: 0, or the share of batch normalisations that are kept frozen, from the beginning or from some epoch on.

Unhealthy: ``left`` above 0, from an evaluation on: `model.eval()` was called, and `model.train()` not again. A share
of 1 from the beginning: a pretrained model that was loaded in evaluation mode and never put into training.

Source: definition.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import per, recorded


def compute(block: Block) -> Mapping[str, Result]:
    """A quotient, and counts as they were recorded."""
    return {
        "share": per(block, "evaluating", "modules"),
        "left": recorded(block, "left"),
        "modules": recorded(block, "modules"),
    }


def oracle() -> Iterable[Case]:
    """Four modules, of which one is frozen and later all are in evaluation."""
    yield Case(
        {
            "modules": [[4], [4], [0], [None], [nan]],
            "evaluating": [[1], [4], [0], [None], [nan]],
            "left": [[0], [3], [0], [None], [nan]],
        },
        {
            "share": [[0.25], [1], [None], [None], [nan]],
            "left": [[0], [3], [0], [None], [nan]],
            "modules": [[4], [4], [0], [None], [nan]],
        },
        "quotients by hand; of no modules there is no share",
    )


METRIC = Metric(
    id="training_mode",
    title="Modules in evaluation mode while training",
    site="activation",
    columns=(
        Column("share", "fraction", "share of the modules that depend on the mode that are in eval()"),
        Column("left", "count", "those of them that were in train() before, if the whole model was"),
        Column("modules", "count", "modules that depend on the mode"),
    ),
    compute=compute,
    source="definition",
    cost="no tensor: the flags of some modules, at every twentieth step",
    plot=Plot("share"),
    oracle=oracle,
    reads="mode",
    doc=__doc__ or "",
)
