"""The largest eigenvalues of the Hessian of the training loss, ``eigenvalue[1]`` being the sharpness.

    H v_i = value_i v_i,   value_1 ≥ value_2 ≥ …

measured as `sharpness`, at every full measurement. Multiple eigenvalues are found once.

Healthy: as many outliers as classes or so, then a bulk near 0 (see `spectral_density`).

Unhealthy: one value that leaves all the others behind, step after step.

Source: Sagun et al. (2017), Empirical analysis of the Hessian of over-parametrized neural networks, arXiv 1706.04454.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf, nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import recorded


def compute(block: Block) -> Mapping[str, Result]:
    """All columns as they were recorded."""
    return {c.name: recorded(block, c.name) for c in METRIC.columns}


def oracle() -> Iterable[Case]:
    """The Hessian of (ab − 1)²/2 at (2, ½)."""
    stats = {
        "value": [[4.25, 0], [nan, None]],
        "residual": [[2e-6, 2e-6], [inf, None]],
        "converged": [[1, 1], [0, None]],
    }
    yield Case(stats, stats, "recorded values pass unchanged", modules=("eigenvalue[1]", "eigenvalue[2]"))


METRIC = Metric(
    id="hessian_eigenvalue",
    title="Largest Hessian eigenvalues",
    site="loss",
    columns=(
        Column("value", "loss/weight²", "eigenvalue of the Hessian of the batch's loss"),
        Column("residual", "loss/weight²", "an eigenvalue lies within this of the value"),
        Column("converged", "1", "1 if residual and change are within tolerance, else 0"),
    ),
    compute=compute,
    source="arXiv 1706.04454",
    cost="part of a full measurement of the spectrum: 40 to 100 Hessian products",
    plot=Plot("value", log=True),
    oracle=oracle,
    reads="hessian_eigenvalue",
    doc=__doc__ or "",
)
