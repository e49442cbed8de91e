"""Units at an end of the range of their activation function.

    share = units of which more than 95 % of the rows lie within 1 % of the range of one of its ends, over all units

for tanh, sigmoid, their hard versions and hardtanh, in the calls and on the rows of dormant_units. Within 1 % of an end
the slope of a tanh is below 0.04 of its largest (an input beyond 2.3), that of a sigmoid too (beyond 4.6).

Healthy: near 0 in hidden layers. Gates (of recurrent networks, of attention over channels) and outputs that are sure
may lie at an end, which dormant_units.role tells apart.

Unhealthy: most units of a hidden layer saturated: hardly any gradient passes them, and what the layer says is little
more than signs. Weights or inputs are too large.

Source: Glorot and Bengio (2010), Understanding the difficulty of training deep feedforward neural networks, sec. 3;
Rakitianskaia and Engelbrecht (2015), Measuring Saturation in Neural Networks; the share is ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import per


def compute(block: Block) -> Mapping[str, Result]:
    """The share of the units."""
    share, known = per(block, "saturated", "units")
    return {"share": (share, known & block.has("saturated"))}


def oracle() -> Iterable[Case]:
    """Three of four units; none; NaN; a function without ends."""
    yield Case(
        {"saturated": [[3], [0], [nan], [None]], "units": [[4], [4], [4], [4]]},
        {"share": [[0.75], [0], [nan], [None]]},
        "a share of the units; without ends there is none",
        modules=("tanh",),
    )


METRIC = Metric(
    id="saturation",
    title="Saturated units",
    site="activation",
    columns=(Column("share", "fraction", "units at an end of their range on more than 95 % of the rows"),),
    compute=compute,
    source="definition; Glorot and Bengio 2010 sec. 3; Rakitianskaia and Engelbrecht 2015",
    cost="another read of the same rows, behind functions whose range has ends only",
    plot=Plot("share", kind="heatmap"),
    oracle=oracle,
    reads="units",
    doc=__doc__ or "",
)
