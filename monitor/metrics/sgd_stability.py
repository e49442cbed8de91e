"""The stability bound of one-sample SGD: half the learning rate times the trace of the Hessian.

    ratio = η · tr(H) / 2,   stderr = η · stderr(tr H) / 2

A minimum that interpolates a square loss can be stable under SGD with batches of one only if ratio ≤ 1. The bound
loosens as the batch grows, so for other batches it is a comparison, not a limit. Recorded for SGD without momentum and
with one learning rate.

Healthy: any value; near convergence with batches of 1 to 4, below 1.

Unhealthy: above 1 near interpolation with batches of 1 to 4: SGD will leave this minimum.

Source: Wu and Su (2023), The implicit regularization of dynamical stability in SGD, arXiv 2305.17490.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import recorded


def compute(block: Block) -> Mapping[str, Result]:
    """Both columns as they were recorded."""
    return {c.name: recorded(block, c.name) for c in METRIC.columns}


def oracle() -> Iterable[Case]:
    """Ten one-hot inputs, mean of squares over two: trace 1, so that η = 1.9 is stable and 2.1 is not."""
    stats = {"ratio": [[0.95], [1.05], [nan], [None]], "stderr": [[0], [0], [nan], [None]]}
    yield Case(stats, stats, "recorded values pass unchanged")


METRIC = Metric(
    id="sgd_stability",
    title="Stability of one-sample SGD",
    site="loss",
    columns=(
        Column("ratio", "1", "half the learning rate times the Hessian's trace"),
        Column("stderr", "1", "its standard error; 0 if exact"),
    ),
    compute=compute,
    source="arXiv 2305.17490",
    cost="nothing beyond hessian_trace",
    plot=Plot("ratio", log=True),
    oracle=oracle,
    reads="sgd_stability",
    doc=__doc__ or "",
)
