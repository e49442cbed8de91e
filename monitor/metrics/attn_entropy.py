"""Entropy of the rows of attention, per head: how many keys a query looks at.

    H_i = −Σ_j p_ij ln p_ij,   entropy = mean_i H_i,   normalised = mean_i H_i / ln n_i

over a seeded, evenly spaced sample of ``rows`` rows; n_i is the number of keys that row i sees. Rows that see a single
key have no choice and are left out of ``normalised``; rows that see none are no rows. Every hundredth step it is the
mean over all rows, where the fused kernel has kept its log-sum-exp (32 bits, no additive mask): one more call of it
with the keys in the place of the values gives H_i = lse_i − scale · ⟨q_i, Σ_j p_ij k_j⟩.

Healthy: between 0 and 1, different from head to head; some heads are sharp for good reason (they look at the token
before, or copy).

Unhealthy: heads at 0 together with large logits (attention entropy collapse: the gradient through the softmax is
gone); all heads of a model at 1 long after the start (attention averages and learns nothing); NaN.

Source: definition; on its collapse Zhai et al. (2023), Stabilizing Transformer Training by Preventing Attention
Entropy Collapse.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import per, recorded


def compute(block: Block) -> Mapping[str, Result]:
    """Means over the sampled rows."""
    return {
        "entropy": per(block, "sum_entropy", "n"),
        "normalised": per(block, "sum_normalised", "n_many"),
        "rows": recorded(block, "n"),
    }


def oracle() -> Iterable[Case]:
    """Uniform over 16 keys; logits (ln 3, 0) and a row with one key; nothing; NaN."""
    yield Case(
        {
            "n": [[1], [2], [0], [1]],
            "n_many": [[1], [1], [0], [1]],
            "sum_entropy": [[2.772589], [0.562335], [0], [nan]],
            "sum_normalised": [[1], [0.811278], [0], [nan]],
        },
        {
            "entropy": [[2.772589], [0.2811675], [None], [nan]],
            "normalised": [[1], [0.811278], [None], [nan]],
            "rows": [[1], [2], [0], [1]],
        },
        "ln 16 = 2.772589; p = (3/4, 1/4): ln 4 − (3/4) ln 3 = 0.562335, over ln 2 = 0.811278",
        modules=("attention[0]",),
    )


METRIC = Metric(
    id="attn_entropy",
    title="Attention entropy",
    site="attention",
    columns=(
        Column("entropy", "nats", "mean entropy of a row"),
        Column("normalised", "fraction", "mean of entropy over the largest possible one, ln(keys seen)"),
        Column("rows", "count", "rows read"),
    ),
    compute=compute,
    source="definition; arXiv 2303.06296",
    cost="shared by all metrics of attention: about 16 rows of each call, every 10 steps; all rows by one more "
    "forward of the kernel, every 100 steps",
    plot=Plot("normalised", kind="heatmap"),
    oracle=oracle,
    reads="attention",
    doc=__doc__ or "",
)
