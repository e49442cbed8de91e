"""The loss scale of mixed-precision training, and the updates it cost.

    scale = factor on the loss before ``backward()``,   skipped = updates the scaler skipped since the previous step

Recorded only where a ``GradScaler`` is used. Updates that are skipped belong to the next one that is made; 20 and more
after the last one of a run have a row of their own.

Healthy: doubles every 2,000 steps and is halved now and then, one skipped update each; the first few updates of a run
are often skipped while the scale finds its size.

Unhealthy: skipped in more than 2 % of the updates, or a scale below 128 and falling: gradients overflow at any scale
(a divergence, or activations beyond 65,504 in float16). With bfloat16 no scale is needed.

Source: Micikevicius et al. (2018), Mixed Precision Training, sec. 3.2; the limits are ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import recorded


def compute(block: Block) -> Mapping[str, Result]:
    """Both columns as they were recorded."""
    return {"scale": recorded(block, "scale"), "skipped": recorded(block, "skipped")}


def oracle() -> Iterable[Case]:
    """An initial scale of 2^16 halved once, and a step without a scaler."""
    stats = {"scale": [[65536], [32768], [None], [inf]], "skipped": [[0], [1], [None], [0]]}
    yield Case(stats, stats, "recorded values pass unchanged")


METRIC = Metric(
    id="loss_scale",
    title="Loss scale",
    site="gradient",
    columns=(
        Column("scale", "1", "factor on the loss"),
        Column("skipped", "steps", "updates skipped since the previous step"),
    ),
    compute=compute,
    source="definition",
    cost="nothing: numbers that the scaler holds",
    plot=Plot("scale", log=True),
    oracle=oracle,
    reads="loss_scale",
    doc=__doc__ or "",
)
