"""How smoothly the ways of samples through the experts go on from one layer to the next, on the first batch of the run.

    e_l(i) = Σ_k g_l(i, k) v_lk,  c_l = cos(e_l, e_{l+1}),  C_i = 1 − mean_l c_l / (max_l c_l + 1e-8)

g as in pathway_distance, v_lk row k of the weight of router l. ``inconsistency`` is the mean of C over samples and
``consistency`` 1 − C: the paper defines C, whose fall is smoother, and tabulates something that rises; here each has
its own name. C is left out for samples whose largest cosine is not above 0 (``undefined``, their fraction), for which
it means nothing, and absent if there are no others; ``mean_cosine`` has no such trouble. Absent for models with one
router or with routers of different width.

Healthy: inconsistency falls slowly, long after the training data are memorised.

Unhealthy: nothing by itself, and nothing healthy either: it falls on random labels too, and hardly falls without a
balancing term and a z-loss, whatever the test accuracy does. Never read generalisation from it: compare it with
router_balance.z and normalised.

Source: Li et al. (2025), Where to find Grokking in LLM Pretraining, arXiv 2506.21551, section 4.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import nan

import numpy as np

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import per, recorded


def compute(block: Block) -> Mapping[str, Result]:
    """Means over the samples for which each is defined."""
    samples, knows = recorded(block, "samples")
    undefined, knows_undefined = recorded(block, "undefined")
    with np.errstate(all="ignore"):
        rough, defined = block["inconsistency"] / (samples - undefined), samples != undefined
    has = block.has("inconsistency") & knows & knows_undefined & defined
    return {
        "inconsistency": (rough, has),
        "consistency": (1 - rough, has),
        "mean_cosine": per(block, "mean_cosine", "samples"),
        "undefined": per(block, "undefined", "samples"),
        "samples": recorded(block, "samples"),
    }


def oracle() -> Iterable[Case]:
    """Two samples at 60° and then 0°; one of four undefined; all undefined; not finite; nothing."""
    yield Case(
        {
            "inconsistency": [[0.5], [0.75], [0], [nan], [None]],
            "mean_cosine": [[1.5], [2], [-1], [nan], [None]],
            "samples": [[2], [4], [2], [2], [None]],
            "undefined": [[0], [1], [2], [0], [None]],
        },
        {
            "inconsistency": [[0.25], [0.25], [None], [nan], [None]],
            "consistency": [[0.75], [0.75], [None], [nan], [None]],
            "mean_cosine": [[0.75], [0.5], [-0.5], [nan], [None]],
            "undefined": [[0], [0.25], [1], [0], [None]],
            "samples": [[2], [4], [2], [2], [None]],
        },
        "c = (.5, 1) gives C = .25; a sample without a positive cosine has none",
    )


METRIC = Metric(
    id="pathway_consistency",
    title="Pathway consistency",
    site="router",
    columns=(
        Column("inconsistency", "1", "C: 1 less the mean over the largest cosine of neighbouring layers"),
        Column("consistency", "1", "1 − C"),
        Column("mean_cosine", "1", "mean cosine of the routing embeddings of neighbouring layers"),
        Column("undefined", "fraction", "samples without a positive cosine, left out of C"),
        Column("samples", "count", "samples followed"),
    ),
    compute=compute,
    source="arXiv 2506.21551 sec. 4",
    cost="with pathway_distance: one product of (sample, expert) by (expert, feature) for each router",
    plot=Plot("mean_cosine"),
    oracle=oracle,
    reads="pathway_consistency",
    doc=__doc__ or "",
)
