"""Share of attention that goes to the first key, per head.

    mass = mean_i p_i0

over a seeded, evenly spaced sample of ``rows`` rows, every hundredth step over all rows (as `attn_entropy`). Rows
without anything to look for send their attention to the first token (an attention sink), which does no harm by itself.

Healthy: with n keys near 1/n at the start ((1/T) Σ 1/i with a causal mask, 0.52 at T = 4 and 0.02 at T = 256); in
trained language models up to 0.9 in many heads.

Unhealthy: nothing by itself; with massive activations it makes low-precision formats and quantisation hard. NaN.

Source: definition; Xiao et al. (2023), Efficient Streaming Language Models with Attention Sinks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import per, recorded


def compute(block: Block) -> Mapping[str, Result]:
    """Mean over the sampled rows."""
    return {"mass": per(block, "sum_sink", "n"), "rows": recorded(block, "n")}


def oracle() -> Iterable[Case]:
    """Uniform causal attention over four tokens; nothing; NaN."""
    yield Case(
        {"n": [[4], [0], [1]], "sum_sink": [[25 / 12], [0], [nan]]},
        {"mass": [[0.5208333], [None], [nan]], "rows": [[4], [0], [1]]},
        "(1 + 1/2 + 1/3 + 1/4) / 4 = 0.520833",
        modules=("attention[0]",),
    )


METRIC = Metric(
    id="attn_sink_mass",
    title="Attention to the first key",
    site="attention",
    columns=(
        Column("mass", "fraction", "mean attention of a row to the first key"),
        Column("rows", "count", "rows read"),
    ),
    compute=compute,
    source="definition; arXiv 2309.17453",
    cost="shared by all metrics of attention: about 16 rows of each call, every 10 steps; all rows by one more "
    "forward of the kernel, every 100 steps",
    plot=Plot("mass", kind="heatmap"),
    oracle=oracle,
    reads="attention",
    doc=__doc__ or "",
)
