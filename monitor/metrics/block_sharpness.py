"""Sharpness of each part of the model: the largest eigenvalue of the Hessian's diagonal block of one module.

    value_b = λ_max(∂²L/∂θ_b∂θ_b) ≤ λ_max(H)

with all other parameters held. Recorded when asked for (``monitor.Curvature(blocks=True)``), at every full measurement;
``converged`` is 1 where residual and change are within 0.1 %.

Healthy: parts differ by orders of magnitude; embeddings and the first and last layers are often the sharpest.

Unhealthy: one block that grows while the others do not: it is where a smaller learning rate is needed.

Source: definition.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf, nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import recorded


def compute(block: Block) -> Mapping[str, Result]:
    """All columns as they were recorded."""
    return {c.name: recorded(block, c.name) for c in METRIC.columns}


def oracle() -> Iterable[Case]:
    """The Hessian of (ab − 1)²/2 at (2, ½) has the diagonal (¼, 4)."""
    stats = {
        "value": [[0.25, 4], [nan, None]],
        "residual": [[0, 0], [inf, None]],
        "converged": [[1, 1], [0, None]],
    }
    yield Case(stats, stats, "recorded values pass unchanged", modules=("a", "b"))


METRIC = Metric(
    id="block_sharpness",
    title="Sharpness of each block",
    site="loss",
    columns=(
        Column("value", "loss/weight²", "largest eigenvalue of the block's own Hessian"),
        Column("residual", "loss/weight²", "an eigenvalue lies within this of the value"),
        Column("converged", "1", "1 if residual and change are within tolerance, else 0"),
    ),
    compute=compute,
    source="definition",
    cost="8 to 25 Hessian products a block, when asked for, at every full measurement of the spectrum",
    plot=Plot("value", log=True, kind="heatmap"),
    oracle=oracle,
    reads="block_sharpness",
    doc=__doc__ or "",
)
