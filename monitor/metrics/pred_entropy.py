"""How undecided the predictions are.

    entropy = (1/N) Σ_i −Σ_k p_ik ln p_ik,   normalised = entropy / ln K,   top1_mass = (1/N) Σ_i max_k p_ik

over the N rows read, p = softmax(z), K classes. ``normalised`` is 1 for a uniform and 0 for a one-hot prediction, and
does not exist for one class.

Healthy: falls from ln K towards the entropy of the data; top1_mass near the accuracy (calibrated).

Unhealthy: entropy falling below half of its best value while the validation loss rises, top1_mass above the
validation accuracy by 0.2 (overconfident, sharpening without learning); or stuck at ln K (nothing is learned).

Source: Shannon (1948); thresholds ours, after The Hyperfitting Phenomenon, arXiv 2412.04318.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import nan

import numpy as np

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import per


def compute(block: Block) -> Mapping[str, Result]:
    """Mean entropy and mean largest probability over the rows that were read."""
    entropy, has = per(block, "sum_entropy", "n")
    classes = block["classes"]
    return {
        "entropy": (entropy, has),
        "normalised": (entropy / np.log(classes), has & block.has("classes") & (classes != 1)),
        "top1_mass": per(block, "sum_top1", "n"),
    }


def oracle() -> Iterable[Case]:
    """Uniform over 32,768; logits (ln 3, 0) and their mean with (0, 0); one class; no rows; NaN."""
    yield Case(
        {
            "n": [[1], [1], [2], [1], [0], [1]],
            "classes": [[32768], [2], [2], [1], [2], [2]],
            "sum_entropy": [[10.397208], [0.562335], [1.255482], [0], [0], [nan]],
            "sum_top1": [[2.0**-15], [0.75], [1.25], [1], [0], [nan]],
        },
        {
            "entropy": [[10.397208], [0.562335], [0.627741], [0], [None], [nan]],
            "normalised": [[1], [0.811278], [0.905639], [None], [None], [nan]],
            "top1_mass": [[2.0**-15], [0.75], [0.625], [1], [None], [nan]],
        },
        "15 ln 2; p = (3/4, 1/4): H = ln 4 − (3/4) ln 3; its mean with ln 2",
        rtol=2e-6,
        modules=("cross_entropy",),
    )


METRIC = Metric(
    id="pred_entropy",
    title="Prediction entropy",
    site="logits",
    columns=(
        Column("entropy", "nats", "mean entropy of a prediction"),
        Column("normalised", "fraction", "entropy over its largest possible value, ln K"),
        Column("top1_mass", "fraction", "mean probability of the first choice"),
    ),
    compute=compute,
    source="definition",
    cost="shared by all metrics of logits: up to 256 rows, or all of 2^14 logits; every 5 steps, 20 on an accelerator",
    plot=Plot("entropy"),
    oracle=oracle,
    reads="logit_rows",
    doc=__doc__ or "",
)
