"""How far every parameter has moved from where the run began.

    distance = ‖θ_{s+1} − θ_0‖₂,   stderr = sqrt(Var(D)) / (2 · distance),   D the estimate of distance²

Large parameters are followed on a fixed sample of one block of elements in sixteen; D is then an estimate and
``stderr`` its standard error carried through the square root (delta method). Small parameters are read whole:
``stderr`` is 0. A sample that has not moved says nothing about its own error, so ``stderr`` is absent there.

Healthy: rises steeply, then like the square root of the steps or the logarithm; levels off as the learning rate
falls.

Unhealthy: linear growth over a long time (a direction the loss does not hold); 0 while others move (frozen or missing
from the optimizer); a jump within one step (the run left its basin).

Source: definition; cluster sampling, Cochran (1977), Sampling Techniques, ch. 9A.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import nan

import numpy as np

from monitor.metric import Block, Case, Column, Metric, Plot, Result


def compute(block: Block) -> Mapping[str, Result]:
    """Distance and its standard error."""
    distance, has = np.sqrt(block["sumsq"]), block.has("sumsq")
    at_start, exact = distance == 0, block["exact"] == 1
    stderr = np.where(at_start & exact, 0.0, np.sqrt(block["sumsq_var"]) / (2 * distance))
    known = has & block.has("sumsq_var") & block.has("exact") & (~at_start | exact)
    return {"distance": (distance, has), "stderr": (stderr, known)}


def oracle() -> Iterable[Case]:
    """A sampled and a whole parameter; at the start; NaN; not read."""
    yield Case(
        {
            "sumsq": [[25, 9], [0, 0], [nan, nan], [None, None]],
            "sumsq_var": [[4, 0], [0, 0], [nan, 0], [None, None]],
            "exact": [[0, 1], [0, 1], [0, 1], [None, None]],
        },
        {
            "distance": [[5, 3], [0, 0], [nan, nan], [None, None]],
            "stderr": [[0.2, 0], [None, 0], [nan, nan], [None, None]],
        },
        "sqrt 25 with standard error sqrt(4) / 10; read whole: no error; an unmoved sample has no known error",
        modules=("large", "small"),
    )


METRIC = Metric(
    id="distance_from_start",
    title="Distance from the start",
    site="parameter",
    columns=(
        Column("distance", "1", "ℓ2 distance from the first recorded parameters"),
        Column("stderr", "1", "standard error of the distance, 0 where the whole parameter is read"),
    ),
    compute=compute,
    source="definition",
    cost="every 10 steps a sixteenth of one read of the parameters; a copy of that sixteenth",
    plot=Plot("distance", log=True, kind="heatmap"),
    oracle=oracle,
    reads="distance",
    doc=__doc__ or "",
)
