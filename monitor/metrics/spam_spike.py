"""Elements of a gradient that are wildly larger than their own history.

    count = #{j : g_j² > 5000 · v̂_j},   ratio = max g_j² / v̂_j among these, 0 if there are none

per parameter, with v̂ Adam's second moment before the step, bias-corrected: 5000 is 70.7 times the element's running
root mean square. Only for optimizers with such a state, once it has 20 updates behind it; elsewhere absent. Elements
whose v̂ is 0 have no history and do not count. After a spike of R times the root mean square v̂ stays raised for
about ln(1e-3·R²)/1e-3 steps (β2 = 0.999), during which the same element can hardly be flagged again.

Healthy: 0 nearly always; a handful of elements now and then in embeddings and normalisation layers.

Unhealthy: many elements of one parameter, or of several, in one step: a bad batch or a spike from below. The
elements' own learning rate is then divided by about sqrt(v) for thousands of steps.

Source: Huang et al. (2025), SPAM, Θ = 5000 and the warm-up of 20; bias correction is ours (the official code has
none, so shortly after a reset its threshold is far lower).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import recorded


def compute(block: Block) -> Mapping[str, Result]:
    """The columns as they were recorded."""
    return {"count": recorded(block, "spikes"), "ratio": recorded(block, "spike_ratio")}


def oracle() -> Iterable[Case]:
    """History g = 1, so v̂ = 1: then 71 is a spike (5041), 70 is not (4900); no Adam state; NaN."""
    yield Case(
        {"spikes": [[1], [0], [None], [nan]], "spike_ratio": [[5041], [0], [None], [nan]]},
        {"count": [[1], [0], [None], [nan]], "ratio": [[5041], [0], [None], [nan]]},
        "recorded values pass unchanged; an optimizer without a second moment gives nothing, not 0",
        modules=("weight",),
    )


METRIC = Metric(
    id="spam_spike",
    title="Spiked gradient elements",
    site="gradient",
    columns=(
        Column("count", "count", "elements above 5000 times their second moment"),
        Column("ratio", "1", "largest square over second moment among them"),
    ),
    compute=compute,
    source="arXiv 2501.06842",
    cost="beyond grad_norm one read of the second moment, of large parameters at every fourth step; on an accelerator "
    "at every eighth, of large ones at every 32nd",
    plot=Plot("count", kind="heatmap"),
    oracle=oracle,
    reads="gradient",
    doc=__doc__ or "",
)
