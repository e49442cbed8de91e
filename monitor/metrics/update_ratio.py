"""How much one step changes a parameter, relative to its size.

    ratio = ‖θ_{s+1} − θ_s‖₂ / ‖θ_{s+1}‖₂,   update_norm = ‖θ_{s+1} − θ_s‖₂

per parameter, from the parameters themselves: weight decay, momentum and whatever the optimizer does are all in it. A
parameter of zeros that was not moved has no ratio.

Healthy: near 1e-3 for weight matrices in mid-training, falling with the learning rate; larger for biases and gains,
which start at 0; about the same over the layers.

Unhealthy: above 1e-1 (the step rewrites the parameter; too large a learning rate or too short a warm-up); below 1e-6
or 0 while others move (frozen, missing from the optimizer, or swallowed by rounding: bfloat16 loses changes below
4e-3).

Source: definition; 1e-3 is the rule of thumb of Karpathy's notes on neural networks, part 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf, nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import recorded


def compute(block: Block) -> Mapping[str, Result]:
    """Relative and absolute size of the change."""
    change, size = block["update_norm"], block["param_norm"]
    has = block.has("update_norm") & block.has("param_norm") & ~((change == 0) & (size == 0))
    return {"ratio": (change / size, has), "update_norm": recorded(block, "update_norm")}


def oracle() -> Iterable[Case]:
    """Quotients by hand, and everything that can go wrong in a quotient."""
    yield Case(
        {
            "update_norm": [[0.003], [0], [0], [2], [nan], [None], [1e-38], [inf]],
            "param_norm": [[3], [3], [0], [0], [0], [3], [1e38], [inf]],
        },
        {
            "ratio": [[1e-3], [0], [None], [inf], [nan], [None], [1e-76], [nan]],
            "update_norm": [[0.003], [0], [0], [2], [nan], [None], [1e-38], [inf]],
        },
        "0/0 is absent; a parameter set to exactly 0 has an infinite ratio; inf/inf is unknown and shown as NaN",
        modules=("weight",),
    )


METRIC = Metric(
    id="update_ratio",
    title="Relative update",
    site="update",
    columns=(
        Column("ratio", "1", "norm of the change over norm of the parameter"),
        Column("update_norm", "1", "ℓ2 norm of the change"),
    ),
    compute=compute,
    source="definition",
    cost="one extra copy of the parameters; every 10 steps one read of it and of them, and one write of it",
    plot=Plot("ratio", log=True, kind="heatmap"),
    oracle=oracle,
    reads="update",
    doc=__doc__ or "",
)
