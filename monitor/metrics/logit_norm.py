"""Length of the rows of logits, raw and with each row's mean removed.

    mean = (1/N) Σ_i ‖z_i‖₂,   max = max_i ‖z_i‖₂;   centred: the same of z_i − mean_k z_ik

over the N rows that were read (``rows``; a seeded sample of at most 256 unless the logits are small, so ``max`` is
the largest among these rows). The softmax sees only the centred part: a raw norm that grows alone is drift along the
direction that the loss cannot feel.

Healthy: grows fast at first, then slowly or not at all; raw and centred close together.

Unhealthy: growing steadily after the training accuracy has reached 1 (scaling the logits is all that still lowers the
loss, and leads to softmax collapse); raw far above centred (output drift; z-loss or weight decay holds it); NaN or
inf.

Source: definition; on its growth Prieto et al. (2025), Grokking at the Edge of Numerical Stability, sec. 4.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf, nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import among, per, recorded


def compute(block: Block) -> Mapping[str, Result]:
    """Mean and largest norm over the rows that were read."""
    return {
        "mean": per(block, "sum_norm", "n"),
        "max": among(block, "max_norm", "n"),
        "centred_mean": per(block, "sum_cnorm", "n"),
        "centred_max": among(block, "max_cnorm", "n"),
        "rows": recorded(block, "n"),
    }


def oracle() -> Iterable[Case]:
    """Rows (3, 4) and (0, 0), no rows, a row with NaN, a row with inf."""
    yield Case(
        {
            "n": [[1], [2], [0], [1], [1]],
            "sum_norm": [[5], [5], [0], [nan], [inf]],
            "max_norm": [[5], [5], [-inf], [nan], [inf]],
            "sum_cnorm": [[0.70710678], [0.70710678], [0], [nan], [nan]],
            "max_cnorm": [[0.70710678], [0.70710678], [-inf], [nan], [nan]],
        },
        {
            "mean": [[5], [2.5], [None], [nan], [inf]],
            "max": [[5], [5], [None], [nan], [inf]],
            "centred_mean": [[0.70710678], [0.35355339], [None], [nan], [nan]],
            "centred_max": [[0.70710678], [0.70710678], [None], [nan], [nan]],
            "rows": [[1], [2], [0], [1], [1]],
        },
        "‖(3, 4)‖ = 5; centred (−.5, .5) with norm sqrt(.5); nothing read is absent, not 0",
        modules=("cross_entropy",),
    )


METRIC = Metric(
    id="logit_norm",
    title="Logit norm",
    site="logits",
    columns=(
        Column("mean", "nats", "mean norm of a row"),
        Column("max", "nats", "largest norm among the rows read"),
        Column("centred_mean", "nats", "mean norm of a row minus its mean"),
        Column("centred_max", "nats", "largest norm of a row minus its mean, among the rows read"),
        Column("rows", "count", "rows read"),
    ),
    compute=compute,
    source="definition; arXiv 2501.04697 sec. 4",
    cost="shared by all metrics of logits: up to 256 rows, or all of 2^14 logits; every 5 steps, 20 on an accelerator",
    plot=Plot("mean", log=True),
    oracle=oracle,
    reads="logit_rows",
    doc=__doc__ or "",
)
