"""How far apart the ways of two samples through the experts are, on the first batch of the run.

    g_l(i, e) = mean over the tokens of sample i of P(e), the softmax of the scores of router l, in evaluation mode
    s_i = for each layer the experts by falling g until their sum exceeds a threshold; layers parted by one symbol
    distance = mean over pairs of Levenshtein(s_i, s_j) / max(|s_i|, |s_j|)

with the threshold 0.7 (``distance``), 0.5 (``half_distance``), and for the k experts of largest g (``chosen_distance``,
k those of a token). An expert is one symbol, whatever its number. ``characters`` is the mean distance of the strings as
they are written ("3,1,5-2,0"), at 0.7 and not divided: the unit that the paper's totals suggest. Pairs are 200 random
ones, fewer for very long pathways. With up to 16 experts look at half_distance and chosen_distance: at 0.7 so many
experts belong to a pathway that all are far apart.

Healthy: in the paper, low at the start, rising while samples are memorised, falling afterwards while the loss is flat.

Unhealthy: near 0 while loads are uneven (see router_balance): all samples take the same way. A falling distance alone
shows nothing about generalisation: in a small mixture it did not fall at all while the test accuracy rose. Read it
beside router_balance.z and normalised, which move it.

Source: Li et al. (2025), Where to find Grokking in LLM Pretraining, arXiv 2506.21551, section 4; symbols, threshold 0.5
and the k largest are ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import among, recorded


def compute(block: Block) -> Mapping[str, Result]:
    """As recorded; without samples there is nothing."""
    return {
        "distance": among(block, "distance", "samples"),
        "half_distance": among(block, "half_distance", "samples"),
        "chosen_distance": among(block, "chosen_distance", "samples"),
        "characters": among(block, "characters", "samples"),
        "samples": recorded(block, "samples"),
        "pairs": recorded(block, "pairs"),
    }


def oracle() -> Iterable[Case]:
    """As it comes; not finite; nothing."""
    yield Case(
        {
            "distance": [[0.5], [nan], [None], [0]],
            "half_distance": [[0.25], [nan], [None], [0]],
            "chosen_distance": [[1], [nan], [None], [0]],
            "characters": [[7.5], [nan], [None], [0]],
            "samples": [[60], [60], [None], [0]],
            "pairs": [[200], [0], [None], [0]],
        },
        {
            "distance": [[0.5], [nan], [None], [None]],
            "half_distance": [[0.25], [nan], [None], [None]],
            "chosen_distance": [[1], [nan], [None], [None]],
            "characters": [[7.5], [nan], [None], [None]],
            "samples": [[60], [60], [None], [0]],
            "pairs": [[200], [0], [None], [0]],
        },
        "stored as computed; no samples, no distance",
    )


METRIC = Metric(
    id="pathway_distance",
    title="Pathway distance",
    site="router",
    columns=(
        Column(
            "distance", "fraction", "edit distance of two pathways over the longer, experts up to 0.7 of the weight"
        ),
        Column("half_distance", "fraction", "the same with experts up to half of the weight"),
        Column("chosen_distance", "fraction", "the same with the k experts of largest weight"),
        Column("characters", "1", "edit distance of the written pathways in characters, at 0.7"),
        Column("samples", "count", "samples followed"),
        Column("pairs", "count", "pairs compared"),
    ),
    compute=compute,
    source="arXiv 2506.21551 sec. 4",
    cost="one forward of the run's first batch and 200 edit distances, in at most half a per cent of the run's time",
    plot=Plot("half_distance"),
    oracle=oracle,
    reads="pathway_distance",
    doc=__doc__ or "",
)
