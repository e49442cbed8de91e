"""How much the loss would still fall if the logits were only made larger: the rate of naive loss minimisation.

    rate = (1/N) Σ_i (z_iy − Σ_k p_ik z_ik) = −dL / d ln c at c = 1, for logits c·z,   p = softmax(z)

over the N rows read, in nats per e-fold of the scale; a constant added to a row does not change it. In a network
without biases whose activations are homogeneous of degree 1 (ReLU), −⟨∂L/∂W_l, W_l⟩ equals ``rate`` for every layer l
(Euler's identity), so it says without any gradient how much of a step may be pure growth.

Healthy: positive and falling with the loss.

Unhealthy: at a training accuracy of 1, ``rate`` over the loss is about the mean margin: scaling still pays, and is all
that pays where the direction of the logits (`zscore_target`) stands still. Negative: smaller logits would lower the
loss (overconfidence on noisy labels).

Source: Prieto et al. (2025), Grokking at the Edge of Numerical Stability, sec. 4.2; Euler's identity for homogeneous
functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import per


def compute(block: Block) -> Mapping[str, Result]:
    """Mean over the rows that were read."""
    return {"rate": per(block, "sum_rate", "n")}


def oracle() -> Iterable[Case]:
    """Logits (2, 0) of class 0 and of class 1; no class targets; no rows; NaN."""
    yield Case(
        {"n": [[1], [2], [4], [0], [1]], "sum_rate": [[0.23840584], [-1.52318831], [None], [0], [nan]]},
        {"rate": [[0.23840584], [-0.76159416], [None], [None], [nan]]},
        "p = (.880797, .119203): 2 − 1.761594, and (0.238406 − 1.761594) / 2 for one row of each class",
        modules=("cross_entropy",),
    )


METRIC = Metric(
    id="nlm_rate",
    title="Rate of naive loss minimisation",
    site="logits",
    columns=(Column("rate", "nats", "fall of the loss per e-fold of the scale of the logits"),),
    compute=compute,
    source="arXiv 2501.04697 sec. 4.2",
    cost="shared by all metrics of logits: up to 256 rows, or all of 2^14 logits; every 5 steps, 20 on an accelerator",
    plot=Plot("rate"),
    oracle=oracle,
    reads="logit_rows",
    doc=__doc__ or "",
)
