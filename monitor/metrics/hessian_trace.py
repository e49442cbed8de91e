"""Trace and Frobenius norm of the Hessian of the training loss, each with its standard error.

    trace = tr H = Σ λ_i,   frobenius = ‖H‖_F = (Σ λ_i²)^½

estimated by Hutchinson's method with ``samples`` vectors of random signs on what the Lanczos basis of the same
measurement leaves over; 0 samples mean that the basis was everything, so that the numbers are exact up to rounding.

Healthy: positive after the first steps, of the order of the number of outliers times the sharpness.

Unhealthy: clearly negative late in training (a saddle, or a loss without a minimum); a standard error as large as the
value says nothing about the value.

Source: Hutchinson (1990); deflation as in Gambhir, Stathopoulos, Orginos (2017), arXiv 1603.05988.
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
    """The Hessian of (ab − 1)²/2 at (2, ½) has eigenvalues 0 and 4¼."""
    stats = {
        "trace": [[4.25], [nan], [None]],
        "stderr": [[0], [nan], [None]],
        "frobenius": [[4.25], [nan], [None]],
        "frobenius_stderr": [[0], [nan], [None]],
        "samples": [[0], [10], [None]],
    }
    yield Case(stats, stats, "recorded values pass unchanged")


METRIC = Metric(
    id="hessian_trace",
    title="Hessian trace",
    site="loss",
    columns=(
        Column("trace", "loss/weight²", "sum of the Hessian's eigenvalues"),
        Column("stderr", "loss/weight²", "standard error of the trace; 0 if exact"),
        Column("frobenius", "loss/weight²", "root of the sum of the squared eigenvalues"),
        Column("frobenius_stderr", "loss/weight²", "standard error of the Frobenius norm; 0 if exact"),
        Column("samples", "count", "random vectors used; 0 if none was needed"),
    ),
    compute=compute,
    source="arXiv 1603.05988",
    cost="10 Hessian products at every full measurement of the spectrum",
    plot=Plot("trace"),
    oracle=oracle,
    reads="hessian_trace",
    doc=__doc__ or "",
)
