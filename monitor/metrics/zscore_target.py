"""How far the target's logit stands above the others, whatever their scale.

    mean = (1/N) Σ_i (z_iy − μ_i) / σ_i,   μ_i and σ_i mean and standard deviation of the K logits of row i

over the N rows read; at most √(K−1), reached when all other logits are equal. Neither a constant added to a row nor a
factor on all of its logits changes it, so it separates what is learned from mere growth: under z → c·z the loss changes
and this does not. A row of equal logits counts as 0.

Healthy: rises from 0 with the accuracy and levels off together with the validation loss.

Unhealthy: unchanged (1 % in 500 steps) while the loss falls by a factor of ten: naive loss minimisation.

Source: Brébisson and Vincent (2016), The Z-loss: a shift and scale invariant classification loss (there as part of a
loss, here as a measure).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import per


def compute(block: Block) -> Mapping[str, Result]:
    """Mean over the rows that were read."""
    return {"mean": per(block, "sum_zscore", "n")}


def oracle() -> Iterable[Case]:
    """The row (3, 0, 0, 0) of class 0 alone and beside one of class 1; no class targets; no rows; NaN."""
    yield Case(
        {"n": [[1], [2], [4], [0], [1]], "sum_zscore": [[1.7320508], [1.1547005], [None], [0], [nan]]},
        {"mean": [[1.7320508], [0.57735027], [None], [None], [nan]]},
        "(3 − 3/4) / (3√3/4) = √3, the largest for 4 classes, and (0 − 3/4) / (3√3/4) = −1/√3",
        modules=("cross_entropy",),
    )


METRIC = Metric(
    id="zscore_target",
    title="Z-score of the target",
    site="logits",
    columns=(Column("mean", "1", "mean z-score of the target's logit within its row"),),
    compute=compute,
    source="Brébisson and Vincent 2016 (arXiv 1604.08859)",
    cost="shared by all metrics of logits: up to 256 rows, or all of 2^14 logits; every 5 steps, 20 on an accelerator",
    plot=Plot("mean"),
    oracle=oracle,
    reads="logit_rows",
    doc=__doc__ or "",
)
