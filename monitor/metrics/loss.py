"""The training loss: the tensor that ``backward()`` was called on.

    value = sum of that tensor over the backward calls of the step, the loss scale divided out

so it has every term the script added (regularisers, auxiliary heads), and is the number whose gradient the optimizer
was given: where each micro-batch's loss is divided by their number, the mean; where a script forgot to, that many times
it. ``micro_steps`` counts the calls; of a closure that is evaluated again and again only the first counts, the loss at
the parameters of the step. Calls whose gradients were removed (set to None) before the next one do not count, unless
the script puts the gradient of the update together from theirs: sharpness-aware minimisation shows the loss at the
perturbed parameters, adversarial training that of the perturbed batch.

Healthy: falls, then flattens, with a few per cent of noise from batch to batch.

Unhealthy: NaN or infinite; a jump that `loss_z` puts beyond 6; far above its own past after having fallen; exactly 0,
where rows have stopped teaching (see `loss_zero_frac`).

Source: definition.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf, nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import recorded


def compute(block: Block) -> Mapping[str, Result]:
    """Both columns as they were recorded."""
    return {"value": recorded(block, "value"), "micro_steps": recorded(block, "micro_steps")}


def oracle() -> Iterable[Case]:
    """What was recorded is what is shown."""
    stats = {"value": [[2.5], [nan], [inf], [None], [0.0]], "micro_steps": [[1], [4], [1], [None], [1]]}
    yield Case(stats, stats, "NaN and inf are values, a step without a loss is absent, 0 is 0")


METRIC = Metric(
    id="loss",
    title="Training loss",
    site="loss",
    columns=(
        Column("value", "loss", "loss that was trained on, summed over the backward() calls of the step"),
        Column("micro_steps", "count", "backward() calls that made the step"),
    ),
    compute=compute,
    source="definition",
    cost="nothing: a number that training computes anyway",
    plot=Plot("value", log=True),
    oracle=oracle,
    reads="loss",
    doc=__doc__ or "",
)
