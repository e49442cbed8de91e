"""How many samples of the first batch of the run are memorised, and since when.

    l_i = mean over its tokens of the cross-entropy of sample i, in evaluation mode, without smoothing and weights
    memorised: the last 5 looks all found l_i ≤ ε and were within 0.05 nats of each other;  ε = 0.15 · ln(classes)

``fraction`` is the share of memorised samples (absent before the fifth look), ``median_step`` the median of the steps
since when they are, which is the first of those five looks; absent while none is. ``loss`` is the mean loss of the
samples. A sample that gets worse again counts as not memorised. In the paper ε is chosen afterwards, so that 20 to 25 %
of the samples are memorised before the last checkpoint, and lies between 1.5 and 2 nats; 0.15 · ln(classes) is 1.6
nats for its vocabulary and can be had during training. The losses of all samples are in the table ``memorisation``.

Healthy: rises while the training loss falls; with repeated data to 1.

Unhealthy: by itself nothing. 1 while the accuracy on other data stays low: memorised, and not generalised.

Source: Li et al. (2025), Where to find Grokking in LLM Pretraining, arXiv 2506.21551, section 3; the window of looks
and ε are ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import among, per, recorded


def compute(block: Block) -> Mapping[str, Result]:
    """Share of the memorised, and the mean loss."""
    return {
        "fraction": per(block, "memorised", "judged"),
        "median_step": among(block, "median_step", "memorised"),
        "threshold": recorded(block, "threshold"),
        "loss": per(block, "sum_loss", "samples"),
        "samples": recorded(block, "samples"),
    }


def oracle() -> Iterable[Case]:
    """A quarter memorised; none yet; too early to tell; not finite; nothing."""
    yield Case(
        {
            "memorised": [[16], [0], [0], [0], [None]],
            "judged": [[64], [64], [0], [64], [None]],
            "median_step": [[300], [nan], [nan], [nan], [None]],
            "threshold": [[0.345388], [0.345388], [0.345388], [0.345388], [None]],
            "sum_loss": [[32], [128], [147.365], [nan], [None]],
            "samples": [[64], [64], [64], [64], [None]],
        },
        {
            "fraction": [[0.25], [0], [None], [0], [None]],
            "median_step": [[300], [None], [None], [None], [None]],
            "threshold": [[0.345388], [0.345388], [0.345388], [0.345388], [None]],
            "loss": [[0.5], [2], [2.302578], [nan], [None]],
            "samples": [[64], [64], [64], [64], [None]],
        },
        "16 of 64; without a memorised sample there is no step; before the fifth look no fraction",
    )


METRIC = Metric(
    id="memorisation",
    title="Memorised samples",
    site="loss",
    columns=(
        Column("fraction", "fraction", "samples of the first batch that are memorised"),
        Column("median_step", "steps", "median of the steps since when they are"),
        Column("threshold", "nats", "largest loss of a memorised sample"),
        Column("loss", "nats", "mean loss of the samples in evaluation"),
        Column("samples", "count", "samples followed"),
    ),
    compute=compute,
    source="arXiv 2506.21551 sec. 3",
    cost="one forward of the run's first batch, in at most 0.5 % of the run's time, if asked for",
    plot=Plot("fraction"),
    oracle=oracle,
    reads="memorisation",
    doc=__doc__ or "",
)
