"""What ``binary_cross_entropy_with_logits`` is given: range and mean of the logits, and whether they are such.

    mean = (1/n) Σ z,   min = min z,   max = max z    over the n logits read (up to 4,096 of each call)
    squashed = 1 if autograd says that z came out of a sigmoid or a softmax and was at most rearranged since, else 0

Looked at in the first ten steps and then in every twentieth; over the micro-batches of a step, squashed is 1 only if it
was in all of them. Of logits that come out of a compiled region, or a function of the user's own, it is not known.

Healthy: both signs, growing from near 0 to a few nats as the model becomes sure; squashed 0.

Unhealthy: squashed 1: the loss applies its sigmoid to probabilities. Beyond ±17 a float32 sigmoid is exactly 1, or the
loss of a right answer is too small to change anything.

Source: definition.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf, nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import among, per, recorded


def compute(block: Block) -> Mapping[str, Result]:
    """Mean and range over what was read."""
    return {
        "mean": per(block, "sum", "n"),
        "min": among(block, "min", "n"),
        "max": among(block, "max", "n"),
        "squashed": among(block, "squashed", "n"),
        "elements": recorded(block, "n"),
    }


def oracle() -> Iterable[Case]:
    """The logits (−1, 2, 5); the probabilities (.25, .75) of a compiled model; none; NaN and infinity."""
    yield Case(
        {
            "n": [[3], [2], [0], [2]],
            "sum": [[6], [1], [0], [nan]],
            "min": [[-1], [0.25], [0], [nan]],
            "max": [[5], [0.75], [0], [inf]],
            "squashed": [[0], [None], [0], [1]],
        },
        {
            "mean": [[2], [0.5], [None], [nan]],
            "min": [[-1], [0.25], [None], [nan]],
            "max": [[5], [0.75], [None], [inf]],
            "squashed": [[0], [None], [None], [1]],
            "elements": [[3], [2], [0], [2]],
        },
        "by hand",
        modules=("binary_cross_entropy",),
    )


METRIC = Metric(
    id="binary_logits",
    title="Logits of a binary cross-entropy",
    site="logits",
    columns=(
        Column("mean", "1", "mean logit"),
        Column("min", "1", "smallest logit"),
        Column("max", "1", "largest logit"),
        Column("squashed", "1", "1 if they came out of a sigmoid or a softmax"),
        Column("elements", "count", "logits that were read"),
    ),
    compute=compute,
    source="definition",
    cost="up to 4,096 logits of every call, at every twentieth step",
    plot=Plot("mean"),
    oracle=oracle,
    reads="binary_logits",
    doc=__doc__ or "",
)
