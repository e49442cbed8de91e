"""How well a linear map of the inputs explains what the network answers.

    r2 = 1 − residual / total

with ``residual`` the unbiased variance that the least-squares map [x, 1] → f(x) leaves and ``total`` the unbiased
variance of f, both summed over outputs. Measured by the probe `monitor.probes.OddFraction` where it has at least twice
as many samples as coefficients; slightly below 0 if nothing is explained.

Healthy: falls from near 1 as features are learned that the task needs.

Unhealthy: stays near 1 with a training accuracy of 1 and a poor held-out accuracy (see `odd_fraction`).

Source: definition (adjusted coefficient of determination).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import per


def compute(block: Block) -> Mapping[str, Result]:
    """What is not left over."""
    share, has = per(block, "residual", "total")
    return {"r2": (1 - share, has)}


def oracle() -> Iterable[Case]:
    """Linear; half explained; noise; a constant; NaN."""
    yield Case(
        {"residual": [[0], [1], [2.1], [0], [nan]], "total": [[3], [2], [2], [0], [1]]},
        {"r2": [[1], [0.5], [-0.05], [None], [nan]]},
        "by definition; the variance of a constant explains nothing and needs no explanation",
    )


METRIC = Metric(
    id="linear_r2",
    title="Linear share of the function",
    site="logits",
    columns=(Column("r2", "fraction", "variance explained by a linear map of the inputs, adjusted"),),
    compute=compute,
    source="definition",
    cost="on request: shares the forward of odd_fraction; one least-squares fit",
    plot=Plot("r2"),
    oracle=oracle,
    reads="linear_fit",
    doc=__doc__ or "",
)
