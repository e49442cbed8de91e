"""How many units of a layer have their kink within a small distance of given inputs.

    cut = (1/N) Σ_i #{units : positive at some vertex of the hull around x_i and not positive at another}
    share = cut / units

The hull of x has the vertices x ± r·v_p for P fixed random orthonormal directions v_p. Measured by the probe
`monitor.probes.LocalComplexity`, layer by layer at every call of an activation function; add them for the whole.

Healthy: falls, rises while the training data are fitted, and falls again around the data when linear regions move to
the decision boundary: then the mapping is smooth near the data, and generalises.

Unhealthy: still rising long after the training accuracy has reached 1: the network goes on cutting the space between
the training points.

Source: Humayun, Balestriero and Baraniuk (2024), Deep Networks Always Grok and Here is Why, arXiv 2402.15555, sec. 2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import per


def compute(block: Block) -> Mapping[str, Result]:
    """Means over the inputs."""
    return {"cut": per(block, "cut", "n"), "share": per(block, "cut", "n", "units")}


def oracle() -> Iterable[Case]:
    """Two layers; no inputs; NaN."""
    yield Case(
        {"n": [[4, 4], [0, 0], [1, 1]], "cut": [[6, 0], [0, 0], [nan, 1]], "units": [[3, 5], [3, 5], [2, 2]]},
        {"cut": [[1.5, 0], [None, None], [nan, 1]], "share": [[0.5, 0], [None, None], [nan, 0.5]]},
        "6 cuts of 3 units at 4 inputs; none of 5",
        modules=("0", "2"),
    )


METRIC = Metric(
    id="local_complexity",
    title="Local complexity",
    site="activation",
    columns=(
        Column("cut", "1", "units that change sign around an input, mean"),
        Column("share", "fraction", "the same over all units of the layer"),
    ),
    compute=compute,
    source="arXiv 2402.15555 sec. 2",
    cost="on request: 2 forwards of the probe's inputs for each direction",
    plot=Plot("cut"),
    oracle=oracle,
    reads="local_complexity",
    doc=__doc__ or "",
)
