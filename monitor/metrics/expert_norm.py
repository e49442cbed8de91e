"""Norm of all parameters of each expert of a mixture.

    norm_e = ‖W_e‖₂ over every parameter of expert e

after the update of the step, every 100 steps. Modules are written ``router[expert]``, as in router_load. Experts are
found in a list of modules beside the router, or as fused parameters with an axis of E; absent where they are neither,
or spread over several processes.

Healthy: norms of one router's experts stay within a factor of two of each other and move slowly.

Unhealthy: the norms of a few busy experts run away from the others, or those of idle experts only shrink, as weight
decay alone does: the router has stopped sending them tokens.

Source: definition; Li et al. (2025), Where to find Grokking in LLM Pretraining, arXiv 2506.21551, for norms by type.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf, nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import recorded


def compute(block: Block) -> Mapping[str, Result]:
    """As recorded."""
    return {"norm": recorded(block, "norm")}


def oracle() -> Iterable[Case]:
    """Two experts; nothing recorded; not finite."""
    yield Case(
        {"norm": [[5, 0], [None, None], [nan, inf]]},
        {"norm": [[5, 0], [None, None], [nan, inf]]},
        "(3, 4) and zeros; absent stays absent; NaN and inf stay",
        modules=("router[0]", "router[1]"),
    )


METRIC = Metric(
    id="expert_norm",
    title="Expert norm",
    site="router",
    columns=(Column("norm", "1", "norm of all parameters of the expert"),),
    compute=compute,
    source="definition",
    cost="one read of the experts' parameters every 100 steps",
    plot=Plot("norm", kind="heatmap"),
    oracle=oracle,
    reads="expert",
    doc=__doc__ or "",
)
