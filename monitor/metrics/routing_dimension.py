"""Effective number of dimensions in which a router tells the samples of the first batch of the run apart.

    d_eff = Σ_j μ_j / (μ_j + λ),   μ the eigenvalues of GᵀG, λ = mean_i ‖g_i‖²

G ``(sample, expert)`` holds the mean probabilities of the samples (see pathway_distance). It lies between 0 and the
smaller of samples and experts: 1 − 1/(n + 1) for n samples of one and the same way, and near the number of experts
that many samples each have for themselves.

Healthy: stays or grows as experts specialise.

Unhealthy: falls to 1: every sample gets the same mixture. A change alone shows nothing about generalisation.

Source: Li et al. (2025), Where to find Grokking in LLM Pretraining, arXiv 2506.21551, section 5, with the kernel of
each expert taken as 1; λ is ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import among, recorded


def compute(block: Block) -> Mapping[str, Result]:
    """As recorded; without samples there is nothing."""
    return {
        "dimension": among(block, "dimension", "samples"),
        "samples": recorded(block, "samples"),
        "experts": recorded(block, "experts"),
    }


def oracle() -> Iterable[Case]:
    """Four samples, each with an expert of its own; not finite; nothing."""
    yield Case(
        {
            "dimension": [[2], [nan], [0], [None]],
            "samples": [[4], [4], [0], [None]],
            "experts": [[4], [4], [4], [None]],
        },
        {
            "dimension": [[2], [nan], [None], [None]],
            "samples": [[4], [4], [0], [None]],
            "experts": [[4], [4], [4], [None]],
        },
        "G = I₄, λ = 1: 4 · 1/2",
        modules=("router",),
    )


METRIC = Metric(
    id="routing_dimension",
    title="Routing dimension",
    site="router",
    columns=(
        Column("dimension", "1", "effective dimension of the samples' mean probabilities"),
        Column("samples", "count", "samples followed"),
        Column("experts", "count", "experts to choose from"),
    ),
    compute=compute,
    source="arXiv 2506.21551 sec. 5",
    cost="with pathway_distance: the eigenvalues of an (expert, expert) matrix for each router",
    plot=Plot("dimension"),
    oracle=oracle,
    reads="routing_dimension",
    doc=__doc__ or "",
)
