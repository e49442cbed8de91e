"""Dead and dormant units behind every activation function.

    s_i = E|h_i| / (mean_k E|h_k| + 1e-9),   dead: s_i ≤ 0,   dormant: s_i ≤ 0.025
    persistence = of the units dormant at the look before, the share that still is

h is what the activation function returns in the module's call, in a forward that is trained on; E is over examples and
positions, of which at most 4,096 are read, evenly spaced. A unit is a channel behind a convolution and a feature (of
the last dimension) behind a product with a matrix. Calls are named by the module in which they are made, numbered from
the second on, and by the function where it is the model itself. Behind tensor parallelism units are those of this
process. The role says what becomes of h: 0 it goes into the next layer, 1 it is the model's output or goes into nothing
but the loss, 2 it gates, that is, multiplies something else first.

Healthy: few dead units, and a dormant share that stays where it was. Some architectures have many dormant units and
do well: wide layers, sparse autoencoders, anything that fires rarely.

Unhealthy: most units of a hidden layer dead, the same ones look after look: no gradient reaches them or passes them,
so nothing will bring them back. A dormant share that rises all the time, persistently: the network loses the ability to
learn something else.

Source: Sokar et al. (2023), The Dormant Neuron Phenomenon in Deep Reinforcement Learning (arXiv 2302.12902), definition
3.1, with the constant of the published code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import per, recorded


def compute(block: Block) -> Mapping[str, Result]:
    """Shares of the recorded numbers of units."""
    return {
        "dead": per(block, "dead", "units"),
        "dormant": per(block, "dormant", "units"),
        "persistence": per(block, "still", "before"),
        "units": recorded(block, "units"),
        "rows": recorded(block, "rows"),
        "role": recorded(block, "role"),
    }


def oracle() -> Iterable[Case]:
    """Mean magnitudes 0, 0.01, 1 and 2.99, twice; a layer without one dormant unit; NaN."""
    yield Case(
        {
            "dead": [[1], [1], [0], [nan]],
            "dormant": [[2], [2], [0], [nan]],
            "before": [[0], [2], [2], [nan]],
            "still": [[0], [2], [0], [nan]],
            "units": [[4], [4], [4], [4]],
            "rows": [[64], [64], [64], [64]],
            "role": [[0], [0], [0], [0]],
        },
        {
            "dead": [[0.25], [0.25], [0], [nan]],
            "dormant": [[0.5], [0.5], [0], [nan]],
            "persistence": [[None], [1], [0], [nan]],
            "units": [[4], [4], [4], [4]],
            "rows": [[64], [64], [64], [64]],
            "role": [[0], [0], [0], [0]],
        },
        "of scores equal to the magnitudes one is 0 and two are at most 0.025; of none there is no persistence",
        modules=("1",),
    )


METRIC = Metric(
    id="dormant_units",
    title="Dead and dormant units",
    site="activation",
    columns=(
        Column("dead", "fraction", "units that are 0 on every row that was read"),
        Column("dormant", "fraction", "units whose mean magnitude is at most 0.025 of the mean unit's"),
        Column("persistence", "fraction", "units dormant at the look before that still are"),
        Column("units", "count", "units of the layer"),
        Column("rows", "count", "rows that were read: examples at one position"),
        Column("role", "1", "0 it goes into the next layer, 1 it is an output, 2 it gates something else"),
    ),
    compute=compute,
    source="Sokar et al. 2023 (arXiv 2302.12902) definition 3.1",
    cost="one read of at most 4,096 rows behind every activation function at every hundredth step and at 3, 10, 25, 50",
    plot=Plot("dead", kind="heatmap"),
    oracle=oracle,
    reads="units",
    doc=__doc__ or "",
)
