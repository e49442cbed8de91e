"""Batch sharpness: the curvature along the step that the batch asks for.

    value = g' H g / ‖g‖²,   g and H the gradient and Hessian of the loss of the step's batch

the cheapest measure of stability there is: one Hessian product. Its mean over batches is what stops growing under SGD,
near 2/η, even where the sharpness of the whole data stays below; with momentum β near 2(1 − β)/η for small batches and
2(1 + β)/η for large ones. A single value is noisy: read the level of many. Of several processes the batch is that of
the first one.

Healthy: rises at first, then hovers.

Unhealthy: negative for long (the gradient points along negative curvature: steps may grow without leaving the slope);
growing by factors of ten; NaN.

Source: Andreyev and Beneventano (2024), Edge of stochastic stability, arXiv 2412.20553.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import recorded


def compute(block: Block) -> Mapping[str, Result]:
    """All columns as they were recorded."""
    return {c.name: recorded(block, c.name) for c in METRIC.columns}


def oracle() -> Iterable[Case]:
    """H = diag(4, 1) and g = (3, 4): (9·4 + 16·1) / 25 = 2.08."""
    stats = {"value": [[2.08], [nan], [None]], "gradient_norm": [[5], [nan], [None]], "examples": [[64], [64], [None]]}
    yield Case(stats, stats, "recorded values pass unchanged")


METRIC = Metric(
    id="batch_sharpness",
    title="Batch sharpness",
    site="loss",
    columns=(
        Column("value", "loss/weight²", "curvature of the batch's loss along its own gradient"),
        Column("gradient_norm", "loss/weight", "norm of that gradient, before clipping"),
        Column("examples", "count", "rows of the batch"),
    ),
    compute=compute,
    source="arXiv 2412.20553",
    cost="one gradient and one Hessian product, about five gradients in all",
    plot=Plot("value", log=True),
    oracle=oracle,
    reads="batch_sharpness",
    doc=__doc__ or "",
)
