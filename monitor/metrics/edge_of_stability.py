"""How near the optimizer is to the edge of stability: its step size against the curvature of the batch.

    ratio = λ_max(S^½ H S^½),   S = η / (c · P)

with the learning rate η and preconditioner P of every parameter and the constant c of the update rule: 2 for gradient
descent, 2 + 2β with momentum, (2 + 2β) / (1 + 2β) with Nesterov's, (2 + 2β₁) / (1 − β₁) for Adam. On a quadratic loss
the optimizer diverges along an eigenvector where ratio exceeds 1. With one learning rate for all, ratio = η λ / c with
λ the (preconditioned) sharpness, ``threshold`` = c / η and ``stable_lr`` = η / ratio, the largest stable learning rate;
with several these two are absent. Clipping and weight decay are left out. Of several processes the batch is that of the
first one, smaller than what the step is made of: the ratio is above that of the step.

Healthy: on full batches, climbs to 1, overshoots it to 1.3 for some tens of steps and hovers there; with small batches
(whose Hessian is sharper than that of all the data) anywhere from 0.01 to above 1.

Unhealthy: above 1.5 for several measurements on full batches while the loss rises.

Source: Cohen et al. (2021, 2022), arXiv 2103.00065 and 2207.14484.
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
    """λ = 4¼ under gradient descent at η = .4: .4 · 4.25 / 2 = .85, threshold 2/.4, stable up to .4/.85."""
    stats = {
        "ratio": [[0.85], [nan], [0.5], [None]],
        "threshold": [[5], [5], [None], [None]],
        "stable_lr": [[0.470588], [nan], [None], [None]],
        "converged": [[1], [0], [1], [None]],
    }
    yield Case(stats, stats, "recorded values pass unchanged; several learning rates have a ratio but no one threshold")


METRIC = Metric(
    id="edge_of_stability",
    title="Ratio to the edge of stability",
    site="loss",
    columns=(
        Column("ratio", "1", "1 is the edge; above it a quadratic loss diverges"),
        Column("threshold", "1/lr", "what the (preconditioned) sharpness may not exceed"),
        Column("stable_lr", "1", "learning rate at which the ratio would be 1"),
        Column("converged", "1", "1 if the eigenvalue has converged, else 0"),
    ),
    compute=compute,
    source="arXiv 2103.00065; arXiv 2207.14484",
    cost="nothing beyond the (preconditioned) sharpness",
    plot=Plot("ratio", log=True),
    oracle=oracle,
    reads="edge_of_stability",
    doc=__doc__ or "",
)
