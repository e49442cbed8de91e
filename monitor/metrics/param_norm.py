"""Size of every parameter.

    norm = ‖θ_{s+1}‖₂    after the update of the step

Healthy: grows at first, then levels off where weight decay balances the updates; constant for gains of normalisation
layers.

Unhealthy: growing without end, faster than the square root of the steps (no weight decay, logits scaling up: see
`logit_norm`); shrinking to 0 (weight decay wins, the layer dies); NaN.

Source: definition.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import recorded


def compute(block: Block) -> Mapping[str, Result]:
    """The norm as it was recorded."""
    return {"norm": recorded(block, "param_norm")}


def oracle() -> Iterable[Case]:
    """θ = (3, 4), a parameter of zeros, a diverged one, one that was not read."""
    stats = [[5, 0], [nan, None]]
    yield Case({"param_norm": stats}, {"norm": stats}, "recorded values pass unchanged", modules=("a", "b"))


METRIC = Metric(
    id="param_norm",
    title="Parameter norm",
    site="parameter",
    columns=(Column("norm", "1", "ℓ2 norm of the parameter"),),
    compute=compute,
    source="definition",
    cost="shared with update_ratio",
    plot=Plot("norm", log=True, kind="heatmap"),
    oracle=oracle,
    reads="update",
    doc=__doc__ or "",
)
