"""The spectrum of the Hessian of the training loss: its negative side, in numbers that compare over a run.

    negative_ratio = |θ_min / θ_max|,   negative_weight = Σ_{θ<0} (|θ| w)^½ / Σ_{θ>0} (θ w)^½,   negative = Σ_{θ<0} w

with the nodes θ and weights w of Gauss quadrature by one Lanczos run of ``nodes`` products. The nodes and weights stand
in the table ``spectral_density`` (columns node, weight: a node's share of all eigenvalues) of the same step.
``smallest`` is the most negative eigenvalue: a Rayleigh quotient, so never below the true one; some eigenvalue lies
within ``smallest_residual`` of it. All else depends on the number of nodes: compare it at equal ``nodes`` only.

Healthy: most eigenvalues near 0, a few large positive ones, and a negative side that shrinks: negative_ratio from about
1 at the start to below 0.1.

Unhealthy: negative_ratio that stays near or above 1 long after the loss has flattened: no minimum is near. Misleading
where most eigenvalues are negative.

Source: Ghorbani, Krishnan, Xiao (2019), arXiv 1901.10159, for the quadrature; Loss Landscape Analysis (LLA), criteria
r_e and K_n with n = ½, for the ratios.
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
    """Nodes −1, 2, 8 with weights .1, .3, .6: r_e = 1/8 and K = .316228 / (.774597 + 2.190890)."""
    stats = {
        "negative_ratio": [[0.125], [inf], [None]],
        "negative_weight": [[0.106636], [inf], [None]],
        "negative": [[0.1], [1], [None]],
        "smallest": [[-1], [nan], [None]],
        "smallest_residual": [[0], [nan], [None]],
        "nodes": [[3], [1], [None]],
    }
    yield Case(stats, stats, "recorded values pass unchanged; no positive node makes both ratios infinite")


METRIC = Metric(
    id="spectral_density",
    title="Negative side of the Hessian spectrum",
    site="loss",
    columns=(
        Column("negative_ratio", "1", "most negative node over the largest, LLA's r_e"),
        Column("negative_weight", "1", "root-weighted mass of negative over positive nodes, LLA's K_n with n = ½"),
        Column("negative", "fraction", "share of the eigenvalues that is below 0"),
        Column("smallest", "loss/weight²", "most negative eigenvalue"),
        Column("smallest_residual", "loss/weight²", "an eigenvalue lies within this of the smallest"),
        Column("nodes", "count", "nodes of the quadrature; ratios compare at equal numbers only"),
    ),
    compute=compute,
    source="arXiv 1901.10159; LLA",
    cost="40 Hessian products at every full measurement of the spectrum",
    plot=Plot("negative_ratio", log=True),
    oracle=oracle,
    reads="spectral_density",
    doc=__doc__ or "",
)
