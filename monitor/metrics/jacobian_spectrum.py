"""How independently single examples can be fitted: the singular values σ of their gradients, one a row.

    J_i = ∇ℓ_i,   effective_rank = exp(−Σ p ln p),  p = σ / Σσ,   condition = (σ_max / σ_min)²

``rank`` counts the singular values above what rounding leaves, σ_min is the smallest of these, and ``rows`` says of
how many examples the spectrum is: no rank exceeds it. The examples are the same at each measurement, rows of the first
batch of the run, in evaluation mode. The singular values themselves are in the table ``jacobian_spectrum``. Measured by
the probe `monitor.probes.JacobianSpectrum`.

The gradient of an example is the smaller the better it is fitted, so both numbers tell first of all how evenly the
examples are. (The condition number behind double descent is that of the outputs, `monitor.curvature.jacobian(…,
of="outputs")`, which does not know the labels.)

Healthy: an effective rank of most of the rows at the start, that falls to a few while one example after the other is
fitted, and a condition number that rises: on digits from 22 of 32 rows to 4, and from 400 to 1e9 (measured).

Unhealthy: an effective rank near 1 from the start: all examples pull along one direction, and a step for one is a step
for all. One that stays high while the loss does: each of the examples pulls its own way, and none is fitted (15 of 32
with a fifth of the labels wrong).

Source: Sven: Singular value descent (per-sample loss Jacobian); Roy and Vetterli (2007), The effective rank; Schaeffer
et al. (2023), Double descent demystified, arXiv 2303.14151, for the condition number.
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
    """σ (4, 2, 1, 1, 0); gradients that are not finite; not measured."""
    stats = {
        "rows": [[5], [5], [None]],
        "rank": [[4], [nan], [None]],
        "effective_rank": [[3.363586], [nan], [None]],
        "condition": [[16], [nan], [None]],
        "largest": [[4], [nan], [None]],
        "smallest": [[1], [nan], [None]],
    }
    yield Case(stats, stats, "recorded values pass unchanged; p = (½, ¼, ⅛, ⅛): entropy 1.75 ln 2")


METRIC = Metric(
    id="jacobian_spectrum",
    title="Spectrum of the examples' gradients",
    site="gradient",
    columns=(
        Column("rows", "count", "examples whose gradients were taken"),
        Column("rank", "count", "singular values above rounding"),
        Column("effective_rank", "1", "how many directions the gradients share out evenly"),
        Column("condition", "1", "largest over smallest squared singular value above rounding"),
        Column("largest", "loss/weight", "largest singular value"),
        Column("smallest", "loss/weight", "smallest singular value above rounding"),
    ),
    compute=compute,
    source="Sven; Roy and Vetterli 2007; arXiv 2303.14151",
    cost="on request: one backward pass of the run's first batch for each of 32 rows (25 to 32 steps of a small GPT, "
    "measured), as often as asked or 1 % of the run's time allows; holds their gradients, at most 2 GB",
    plot=Plot("effective_rank"),
    oracle=oracle,
    reads="jacobian_spectrum",
    doc=__doc__ or "",
)
