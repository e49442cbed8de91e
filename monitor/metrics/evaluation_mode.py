"""Losses that were evaluated while dropout or batch normalisation was in training mode.

    losses = losses made, without gradients, of outputs of the model in training mode since the last step

found as `logged` finds those of evaluations: what the model gives back as its loss, or a loss function of torch that is
called with its output. Only of models with a dropout or a normalisation that depends on the mode, and not of data that
were trained on before or are in the next step, as far as these are known again (on a CPU). Beside them ``evaluated``,
the forwards in evaluation mode since the last step. Recorded at the steps at which there were such losses.

Healthy: nothing is recorded. Noise that is wanted (dropout as a sample of models, a generator's images, a target that
is learned from) is no loss and is not counted.

Unhealthy: the same at every evaluation, and none of them in evaluation mode: `model.eval()` is missing.

Source: definition.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import recorded


def compute(block: Block) -> Mapping[str, Result]:
    """The counts as they were recorded."""
    return {name: recorded(block, name) for name in ("losses", "dropouts", "norms", "evaluated")}


def oracle() -> Iterable[Case]:
    """Three batches with two dropouts and four normalisations."""
    seen = {
        "losses": [[3], [None], [nan]],
        "dropouts": [[2], [None], [nan]],
        "norms": [[4], [None], [nan]],
        "evaluated": [[0], [None], [nan]],
    }
    yield Case(seen, seen, "recorded values pass unchanged")


METRIC = Metric(
    id="evaluation_mode",
    title="Losses evaluated in training mode",
    site="activation",
    columns=(
        Column("losses", "count", "losses made of outputs in training mode since the last step"),
        Column("dropouts", "count", "dropout modules that were in training mode"),
        Column("norms", "count", "normalisations with averages that were in training mode"),
        Column("evaluated", "count", "forwards in evaluation mode since the last step"),
    ),
    compute=compute,
    source="definition",
    cost="no tensor; flags of some modules at a forward without gradients in training mode",
    plot=Plot("losses"),
    oracle=oracle,
    reads="evaluation_mode",
    doc=__doc__ or "",
)
