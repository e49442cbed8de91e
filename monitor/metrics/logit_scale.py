"""How large the logits are, and by how much the first choice leads.

    rms = sqrt(Σ z² / NK),   mean = Σ z / NK,   max = max z,   min = min z,   max_abs = max |z|
    row_std = (1/N) Σ_i sqrt(mean_k z_ik² − (mean_k z_ik)²)
    margin = (1/N) Σ_i (largest − second largest z_i),   true_margin = (1/N) Σ_i (z_iy − max_{k≠y} z_ik)

over the N rows read and K classes. ``row_std`` and the margins do not change when a constant is added to a row, as
the softmax does not. ``true_margin`` needs targets that are classes; it is negative while most answers are wrong.

Healthy: row_std of a few nats; true_margin grows with the accuracy and levels off.

Unhealthy: mean, max and min drifting one way together (see `log_z`). Margin still growing while the accuracy is already
1 and validation does not improve (naive loss minimisation): absorption begins where the margin reaches p·ln 2 plus the
log of the number of rivals: about 16.6 nats and more in float32, 7.6 in float16, 5.5 in bfloat16.

Source: definition; Prieto et al. (2025), Grokking at the Edge of Numerical Stability, sec. 4.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import nan

import numpy as np

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import among, per


def compute(block: Block) -> Mapping[str, Result]:
    """Scale and margins over the rows that were read."""
    mean_square, has = per(block, "sumsq", "n", "classes")
    high, high_has = among(block, "max_z", "n")
    low, low_has = among(block, "min_z", "n")
    return {
        "rms": (np.sqrt(mean_square), has),
        "row_std": per(block, "sum_rowstd", "n"),
        "max_abs": (np.maximum(np.abs(high), np.abs(low)), high_has & low_has),
        "mean": per(block, "sum_z", "n", "classes"),
        "margin": per(block, "sum_margin", "n"),
        "true_margin": per(block, "sum_true_margin", "n"),
        "max": (high, high_has),
        "min": (low, low_has),
    }


def oracle() -> Iterable[Case]:
    """The row (3, 0, 0, 0); the rows (−7, 1) and (1, 1); no rows; NaN."""
    yield Case(
        {
            "n": [[1], [2], [0], [1]],
            "classes": [[4], [2], [4], [4]],
            "sumsq": [[9], [52], [0], [nan]],
            "sum_z": [[3], [-4], [0], [nan]],
            "max_z": [[3], [1], [0], [nan]],
            "min_z": [[0], [-7], [0], [0]],
            "sum_rowstd": [[1.299038], [4], [0], [nan]],
            "sum_margin": [[3], [8], [0], [nan]],
            "sum_true_margin": [[3], [None], [0], [-1]],
        },
        {
            "rms": [[1.5], [3.6055513], [None], [nan]],
            "row_std": [[1.299038], [2], [None], [nan]],
            "max_abs": [[3], [7], [None], [nan]],
            "mean": [[0.75], [-1], [None], [nan]],
            "margin": [[3], [4], [None], [nan]],
            "true_margin": [[3], [None], [None], [-1]],
            "max": [[3], [1], [None], [nan]],
            "min": [[0], [-7], [None], [0]],
        },
        "row std of (3,0,0,0) = sqrt(9/4 − 9/16); of (−7, 1) = 4 and of (1, 1) = 0; no class targets: absent",
        modules=("cross_entropy",),
    )


METRIC = Metric(
    id="logit_scale",
    title="Logit scale and margins",
    site="logits",
    columns=(
        Column("rms", "nats", "root mean square of all logits read"),
        Column("row_std", "nats", "mean standard deviation within a row"),
        Column("max_abs", "nats", "largest absolute value among the logits read"),
        Column("mean", "nats", "mean of all logits read"),
        Column("margin", "nats", "mean lead of the first choice over the second"),
        Column("true_margin", "nats", "mean lead of the true class over the best other"),
        Column("max", "nats", "largest of the logits read"),
        Column("min", "nats", "smallest of the logits read"),
    ),
    compute=compute,
    source="definition; arXiv 2501.04697 sec. 4",
    cost="shared by all metrics of logits: up to 256 rows, or all of 2^14 logits; every 5 steps, 20 on an accelerator",
    plot=Plot("row_std"),
    oracle=oracle,
    reads="logit_rows",
    doc=__doc__ or "",
)
