"""The residual stream has grown far beyond what it was.

What it means:
    What the blocks hand on has become hundreds of times larger within the last looks, and large in itself. Every
    gradient that passes through the last normalisation is smaller by as much, what a block adds is lost in rounding
    beside it (bfloat16 has 8 bits: a term below 1/256 of the stream vanishes), and float16 overflows at 65,504.

How it is decided:
    The root mean square of a block's output is at least 300 times the smallest of the last 40 looks (2,000 steps, once
    the early looks are past) and at least 100, for 2 looks. It is critical from 10,000 on.

What to do:
    A lower learning rate or a longer warm-up: the stream grows with the size of the updates. Weight decay; a
    normalisation of each block's output; smaller initial weights of what each block adds.

When it is wrong:
    A model whose output is that large by design and began near 0. A pretrained model with massive first tokens is not
    flagged, since its stream does not grow; growth slower than 300 times in 2,000 steps is not found at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._series import rolling_max

OWN = (
    "calibrated on 24 trainings of a small transformer (2 and 6 blocks, learning rates 0.003 to 0.1, with and without "
    "qk-norm), where all that are flagged end 3 to 80 % above the best loss: "
)


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Blocks whose output has grown too far."""
    block = window["residual_stream.rms"]
    value, has = block["residual_stream.rms"], block.has("residual_stream.rms")
    size = int(p["window"])
    # the smallest of this and the earlier looks; what is absent or not finite is no smallest
    padded = np.full((len(value) + size, value.shape[1]), np.inf)
    padded[size:] = np.where(has & np.isfinite(value), value, np.inf)
    smallest = -rolling_max(-padded, size + 1)
    judged = has & ~np.isnan(value) & np.isfinite(smallest)
    growth = np.where(smallest > 0, value / smallest, 1.0)
    mask = judged & (growth >= p["growth"]) & (value >= p["limit"])
    evidence = {"smallest": smallest, "rms": value}
    yield Hits(block.steps, block.modules, mask, judged, growth, p["growth"], evidence, critical=value >= p["critical"])


RULE = Rule(
    id="residual_explosion",
    title="Residual stream explosion",
    severity="warning",
    site="activation",
    message="The output of {module} has grown {value:.0f}-fold, from {smallest:.3g} to {rms:.4g} (root mean square).",
    refute="the loss goes on falling while the stream stays as large, in float32",
    remedies=(
        Remedy("lower the learning rate or lengthen the warm-up"),
        Remedy("use weight decay, or normalise what each block adds"),
    ),
    params=(
        Param("growth", 300, "times", OWN + "those within 2 % of it stay below 180"),
        Param("limit", 100, "1", OWN + "those within 2 % of it stay below 51"),
        Param("critical", 1e4, "1", "own choice: less than a factor of 7 below the largest float16, 65,504"),
        Param("window", 40, "points", "own choice: 2,000 steps at the default cadence"),
    ),
    needs=("residual_stream.rms",),
    check=check,
    lookback=40,
    hold=2,
    doc=__doc__ or "",
)
