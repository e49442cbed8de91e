"""Two sources of data pull the weights in opposite directions, and have for long.

What it means:
    A step that lowers the loss of one source raises that of the other. Either they contradict each other (labels of
    one are wrong or mean something else, one has noise that is being memorised), or they compete for the same weights,
    as sources with classes of their own do in a shared output layer.

How it is decided:
    The median cosine between their gradients, `gradient_alignment`, is below -0.3 over the last 10 measurements.
    Single values scatter around 0 once both sources are fitted, and say nothing.

What to do:
    Look at the labels of both sources first. If both are right: give each an output layer of its own, or lower the
    share of the one that matters less; a larger model has more room for both.

When it is wrong:
    Both batches of a source are fixed; a source that is not typical of its batch is not seen. Sources whose weights
    are the same but whose classes differ conflict from the first step on, and are learned all the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from monitor.rule import Hits, Param, Remedy, Rule, Window

COSINE = "gradient_alignment.cosine"
MEASUREMENTS = 10


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Measurements that end a stretch of opposed gradients."""
    block = window[COSINE]
    values = np.where(block.has(COSINE), block[COSINE], np.nan) if block.modules else block[COSINE]
    median = np.full(values.shape, np.nan)  # NaN if one is, or if there are not enough
    if len(values) >= MEASUREMENTS:
        stretches = np.lib.stride_tricks.sliding_window_view(values, MEASUREMENTS, axis=0)
        median[MEASUREMENTS - 1 :] = np.median(stretches, axis=2)
    has = ~np.isnan(median)
    yield Hits(block.steps, block.modules, has & (median < p["cosine"]), has, median, p["cosine"], {"cosine": values})


RULE = Rule(
    id="gradient_conflict",
    title="Sources of data in conflict",
    severity="info",
    site="gradient",
    message="The gradients of {module} have had a median cosine of {value:.2f}: what helps one source harms the other.",
    refute="training without one of them does not lower the loss of the other",
    remedies=(
        Remedy("look at the labels of both sources"),
        Remedy("an output layer for each source, or other shares of the sources"),
    ),
    params=(
        Param(
            "cosine",
            -0.3,
            "1",
            "calibrated on 14 trainings on two sources of digits: two halves of the same data 0.2 to 0.4 at the "
            "lowest, inverted images -0.27 for a while, a quarter of the labels random -0.4, all labels of one "
            "moved by one -0.7",
        ),
    ),
    needs=(COSINE,),
    check=check,
    lookback=MEASUREMENTS,
    release=5,
    doc=__doc__ or "",
)
