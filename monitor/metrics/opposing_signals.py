"""Rows that pull hardest, in opposite directions, along the sharpest direction of the loss.

    p_i = u' ∇ℓ_i,   u the top eigenvector of the Hessian, ℓ_i the loss of row i

``up`` is the least number of rows that hold half of what the positive p_i sum to, ``up_mean`` their mean; ``down`` and
``down_mean`` likewise for the negative ones; ``typical`` is the median of |p_i|, ``cancelled`` = 1 − |Σ p_i| / Σ |p_i|.
Two small groups with means far above ``typical`` that cancel are outliers with opposing signals: they, not the bulk of
the data, decide the sharpness. The strongest rows stand in the table ``opposing_signals`` (columns row, projection,
loss; rows count through the batch as the cross-entropy saw it, ignored ones included). Measured where the loss is made
of calls of ``cross_entropy``.

Healthy: groups of a tenth of the rows or more; or small ones that come and go.

Unhealthy: the same kind of row in both groups for long: look at them for ambiguous or wrong labels.

Source: Rosenfeld and Risteski (2023), Outliers with opposing signals have an outsized effect on neural network
optimization, arXiv 2311.04163; they rank rows by their change of loss, here they are ranked by projection.
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
    """Six rows with p = (6, .5, −.5, −5, .25, −.25): one row holds half of either side."""
    stats = {
        "rows": [[6], [6], [None]],
        "up": [[1], [nan], [None]],
        "down": [[1], [nan], [None]],
        "up_mean": [[6], [nan], [None]],
        "down_mean": [[-5], [nan], [None]],
        "typical": [[0.5], [nan], [None]],
        "cancelled": [[0.92], [nan], [None]],
    }
    yield Case(stats, stats, "recorded values pass unchanged; |6.75 − 5.75| / 12.5 is left after cancelling")


METRIC = Metric(
    id="opposing_signals",
    title="Opposing signals",
    site="loss",
    columns=(
        Column("rows", "count", "rows of the batch that were looked at"),
        Column("up", "count", "fewest rows that hold half of the positive projections"),
        Column("down", "count", "fewest rows that hold half of the negative projections"),
        Column("up_mean", "loss/weight", "mean projection of the first group"),
        Column("down_mean", "loss/weight", "mean projection of the second group"),
        Column("typical", "loss/weight", "median size of a row's projection"),
        Column("cancelled", "fraction", "share of the pull along the direction that cancels between rows"),
    ),
    compute=compute,
    source="arXiv 2311.04163",
    cost="about four gradients at every full measurement of the spectrum",
    plot=Plot("cancelled"),
    oracle=oracle,
    reads="opposing_signals",
    doc=__doc__ or "",
)
