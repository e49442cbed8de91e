"""The largest attention logit of each head: an upper bound often, the number itself now and then.

    lse_max = max_i ln Σ_j exp(s_ij),   max_i (lse_i − ln n_i) ≤ max_ij s_ij ≤ lse_max

with s what the softmax is given (scaled, with an additive bias, masked keys left out) and n_i the keys that row i sees.
``lse_max`` costs almost nothing, because the fused kernel has kept it for its backward pass; it is a bound, never the
maximum, and too high by at most ln n (7 at 1,000 keys): tight where it matters. ``found`` is the largest logit of the
rows that were read: those with the largest log-sum-exp and a seeded sample. Where ``certified`` is 1, no row that was
not read can hold a larger one, so it is the maximum; where it is 0, the maximum lies between ``lower`` and
``lse_max``. Without a saved log-sum-exp (dropout or values of another size than queries on a CPU, activation
checkpointing) there is no bound, and ``found`` is the largest of the sample. Attention written by hand (a softmax over
products of queries and keys, multiplied again) has no bound either, but all its logits are in memory: ``found`` is the
largest of all rows, and certified.

Healthy: of order 1 to 50, settling after warm-up.

Unhealthy: growing without end; above 1e3 training suffers, above 1e4 every run diverged; NaN or inf.

Source: Wortsman et al. (2023), Small-scale proxies for large-scale Transformer training instabilities, sec. 3; the
bound follows from the definition of the log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf, nan

import numpy as np

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import recorded


def compute(block: Block) -> Mapping[str, Result]:
    """Both sides of the bound, and whether the largest logit read is the largest there is."""
    found, unread, lower = block["found"], block["unread"], block["lse_lower"]
    certified = np.where(np.isnan(found) | np.isnan(unread), np.nan, found >= unread)
    return {
        "lse_max": recorded(block, "lse_max"),
        "found": recorded(block, "found"),
        "certified": (certified, block.has("found") & block.has("unread")),
        "lower": (np.maximum(found, lower), block.has("found") & block.has("lse_lower")),
    }


def oracle() -> Iterable[Case]:
    """All rows read, some unread, none saved, NaN, nothing but the bound."""
    yield Case(
        {
            "lse_max": [[33.386294], [8], [None], [nan], [5]],
            "found": [[32], [6], [6], [nan], [None]],
            "unread": [[-inf], [6.5], [inf], [nan], [None]],
            "lse_lower": [[32], [6.25], [-inf], [nan], [None]],
        },
        {
            "lse_max": [[33.386294], [8], [None], [nan], [5]],
            "found": [[32], [6], [6], [nan], [None]],
            "certified": [[1], [0], [0], [nan], [None]],
            "lower": [[32], [6.25], [6], [nan], [None]],
        },
        "q = k = 2·1 with d = 64 over 4 keys: every logit 8·2² = 32, log-sum-exp 32 + ln 4; a row with lse 6.5 was not "
        "read, so 6 may not be the maximum",
        modules=("attention[0]",),
    )


METRIC = Metric(
    id="attn_logit_max",
    title="Largest attention logit",
    site="attention",
    columns=(
        Column("lse_max", "nats", "largest log-sum-exp of a row: an upper bound of the largest logit"),
        Column("found", "nats", "largest logit of the rows that were read"),
        Column("certified", "1", "1 if that is the largest of all rows, 0 if it may not be"),
        Column("lower", "nats", "a lower bound of the largest logit"),
    ),
    compute=compute,
    source="arXiv 2309.14322 sec. 3",
    cost="the bound: one read of the saved log-sum-exp, every 5 steps; the rest: about 32 rows a head, every 10 steps; "
    "by hand: one read of the logits, every 10 steps",
    plot=Plot("lse_max", kind="heatmap"),
    oracle=oracle,
    reads="attention",
    doc=__doc__ or "",
)
