"""Sharpness as an adaptive optimizer meets it: the largest eigenvalue of P^-½ H P^-½, P its preconditioner.

    Adam, AdamW: P = (1 − β₁ᵗ)(√(v / (1 − β₂ᵗ)) + ε),   RMSprop: P = √v + ε

from the optimizer's real state before the update; ``threshold`` is what the value may not exceed on a quadratic loss:
(2 + 2β₁) / ((1 − β₁) η), which is 38/η at β₁ = 0.9. Weight decay is no part of H. Absent for SGD, whose P is 1, and
where groups have different learning rates (`edge_of_stability` has their common ratio).

Healthy: on full batches, rises to the threshold and stays there while `sharpness` itself goes where it likes; on small
batches, below it.

Unhealthy: above the threshold for long while the loss rises.

Source: Cohen et al. (2022), Adaptive gradient methods at the edge of stability, arXiv 2207.14484.
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
    """H = diag(4, 1) and P = diag(2, .1): P^-½ H P^-½ = diag(2, 10); threshold 38/η at η = .001."""
    stats = {"value": [[10], [nan], [None]], "threshold": [[38000], [38000], [None]], "converged": [[1], [0], [None]]}
    yield Case(stats, stats, "recorded values pass unchanged")


METRIC = Metric(
    id="preconditioned_sharpness",
    title="Preconditioned sharpness",
    site="loss",
    columns=(
        Column("value", "1/lr", "largest eigenvalue of the preconditioned Hessian"),
        Column("threshold", "1/lr", "what it may not exceed on a quadratic loss"),
        Column("converged", "1", "1 if residual and change are within tolerance, else 0"),
    ),
    compute=compute,
    source="arXiv 2207.14484",
    cost="8 to 25 Hessian products and two vectors of the parameters' size, with each sharpness",
    plot=Plot("value", log=True),
    oracle=oracle,
    reads="preconditioned_sharpness",
    doc=__doc__ or "",
)
