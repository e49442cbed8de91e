"""How much of the function that the network computes is odd, as a linear map is.

    omega = E[f_odd²] / (E[f_odd²] + Var[f_even]),   f_odd(x) = (f(x) − f(−x)) / 2,   f_even(x) = (f(x) + f(−x)) / 2

over a fixed sample of centred inputs and its mirror images, summed over outputs, of which what is common to a row is
taken away. 1 for a linear map with or without a constant, 0 for an even function. Measured by the probe
`monitor.probes.OddFraction`.

Healthy: between 0 and 1, as the task demands; falling where the task needs features that no linear map gives.

Unhealthy: above 0.9 with a training accuracy of 1 and a held-out accuracy near chance: the training data were
interpolated linearly, features are not learned yet (keep training, or begin with smaller weights).

Source: definition; phases after Xu et al. (2023), Benign Overfitting and Grokking in ReLU Networks for XOR Cluster
Data, arXiv 2310.02541.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import recorded


def compute(block: Block) -> Mapping[str, Result]:
    """The share of the odd part."""
    total = block["odd"] + block["even"]
    has = block.has("odd") & block.has("even") & (total != 0)
    return {"omega": (block["odd"] / total, has), "samples": recorded(block, "n")}


def oracle() -> Iterable[Case]:
    """w·x; x1² − x2²; x1 + x1 x2 with x normal; a constant; NaN."""
    yield Case(
        {"n": [[9], [9], [9], [9], [9]], "odd": [[2], [0], [1], [0], [nan]], "even": [[0], [4], [1], [0], [1]]},
        {"omega": [[1], [0], [0.5], [None], [nan]], "samples": [[9], [9], [9], [9], [9]]},
        "variances of the odd and even parts: linear, even, E[x1²] = E[x1² x2²] = 1; of nothing there is no share",
    )


METRIC = Metric(
    id="odd_fraction",
    title="Odd fraction of the function",
    site="logits",
    columns=(
        Column("omega", "fraction", "variance of the odd part over that of the whole"),
        Column("samples", "count", "inputs, each with its mirror image"),
    ),
    compute=compute,
    source="definition; arXiv 2310.02541",
    cost="on request: two forwards of the probe's inputs, as often as asked or 1 % of the run's time allows",
    plot=Plot("omega"),
    oracle=oracle,
    reads="odd_fraction",
    doc=__doc__ or "",
)
