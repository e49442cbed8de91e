"""How alike the experts of a router are: cosines between the weights of each two of them.

    c_ij = ⟨w_i, w_j⟩ / (‖w_i‖ ‖w_j‖):  mean = mean_{i<j} c_ij,  largest = max_{i<j} c_ij

over the same random sample w of entries of each expert's matrices (``entries``: 2^16 over the number of experts, at
least 2^10, fewer if there are not as many), after the update of the step, every 100 steps. Cosines of unrelated experts
scatter round 0 by 1/√entries. Two experts that do the same with their hidden units in another order are not seen.

Healthy: near 0 for experts with a random beginning of their own, however long they train. Experts copied from one dense
layer begin at 1 and move apart.

Unhealthy: two experts that stay at 1 or come close to it: they are one expert, paid for twice.

Source: definition; Komatsuzaki et al. (2022), Sparse Upcycling, arXiv 2212.05055, for experts that begin as copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import recorded


def compute(block: Block) -> Mapping[str, Result]:
    """As recorded."""
    return {
        "mean": recorded(block, "mean_cosine"),
        "largest": recorded(block, "max_cosine"),
        "entries": recorded(block, "entries"),
    }


def oracle() -> Iterable[Case]:
    """Three experts of which two are the same; nothing recorded; an expert of zeros has no direction."""
    yield Case(
        {
            "mean_cosine": [[1 / 3], [None], [nan]],
            "max_cosine": [[1], [None], [nan]],
            "entries": [[1024], [None], [1024]],
        },
        {"mean": [[1 / 3], [None], [nan]], "largest": [[1], [None], [nan]], "entries": [[1024], [None], [1024]]},
        "cosines 1, 0, 0; absent stays absent; 0 / 0",
        modules=("router",),
    )


METRIC = Metric(
    id="expert_similarity",
    title="Expert similarity",
    site="router",
    columns=(
        Column("mean", "1", "mean cosine between the weights of two experts"),
        Column("largest", "1", "largest cosine between the weights of two experts"),
        Column("entries", "count", "weights of each expert that were compared"),
    ),
    compute=compute,
    source="definition",
    cost="2^16 weights of the experts of a router, at least 2^10 of each, every 100 steps",
    plot=Plot("largest"),
    oracle=oracle,
    reads="experts",
    doc=__doc__ or "",
)
