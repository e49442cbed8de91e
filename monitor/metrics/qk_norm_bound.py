"""How large the logits of a head could be for its queries and keys, and how much of it they use.

    bound = max_i ‖q_i‖ · max_j ‖k_j‖ · scale,   alignment = (largest logit of the rows read) / bound

over all queries and keys of a micro-batch, the largest of the step; scale is 1/√d unless the call says otherwise. For
logits without an additive bias, alignment lies between −1 and 1. Of attention written by hand the scale is read from
the operations between the product and the softmax; where it is not a number (a learned temperature), or queries and
keys are not kept, there is no bound.

Healthy: norms that settle after warm-up; a bound two to three times the largest logit.

Unhealthy: norms that keep growing; it is they, not the alignment, that make attention logits diverge. A norm on queries
and keys (qk-norm) holds them.

Source: Wortsman et al. (2023), Small-scale proxies for large-scale Transformer training instabilities, sec. 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import per, recorded


def compute(block: Block) -> Mapping[str, Result]:
    """The bound, its factors, and the share of it that is used."""
    return {
        "bound": recorded(block, "qk_bound"),
        "alignment": per(block, "found", "qk_bound"),
        "q_norm": recorded(block, "q_norm"),
        "k_norm": recorded(block, "k_norm"),
    }


def oracle() -> Iterable[Case]:
    """Parallel queries and keys, orthogonal ones, all zero, NaN."""
    yield Case(
        {
            "found": [[32], [0], [0], [nan]],
            "qk_bound": [[32], [6], [0], [nan]],
            "q_norm": [[16], [3], [0], [nan]],
            "k_norm": [[16], [4], [0], [2]],
        },
        {
            "bound": [[32], [6], [0], [nan]],
            "alignment": [[1], [0], [None], [nan]],
            "q_norm": [[16], [3], [0], [nan]],
            "k_norm": [[16], [4], [0], [2]],
        },
        "q = k = 2·1, d = 64: norms 16, 16·16/8 = 32 = every logit; (3, 0)·(0, 4) = 0 of 12·0.5",
        modules=("attention[0]",),
    )


METRIC = Metric(
    id="qk_norm_bound",
    title="Bound of attention logits from norms",
    site="attention",
    columns=(
        Column("bound", "nats", "largest query norm × largest key norm × scale: no logit can be larger"),
        Column("alignment", "1", "largest logit of the rows read over that bound"),
        Column("q_norm", "1", "largest norm of a query"),
        Column("k_norm", "1", "largest norm of a key"),
    ),
    compute=compute,
    source="arXiv 2309.14322 sec. 3",
    cost="one read of queries and keys, every 10 steps",
    plot=Plot("bound", log=True, kind="heatmap"),
    oracle=oracle,
    reads="attention",
    doc=__doc__ or "",
)
