"""The output logits drift away together.

What it means:
    The softmax does not see a constant added to all logits, so nothing but weight decay or a z-loss holds their common
    level. Late in long trainings without either it has been seen to run away, mostly downwards, until rounding at that
    level spoils the probabilities and the training diverges.

How it is decided:
    The mean of log Z (log of the sum of exponentials) is below −5, or more than 20 nats above that of zero logits,
    ln K, and over the last 200 points (1,000 steps) the means of the four quarters of them go one way, away from 0.

What to do:
    A z-loss of 1e-4 beside the cross-entropy, or weight decay on the output layer.

When it is wrong:
    Logits that a model shifts by design. Growing margins raise log Z too: look at logit_scale.mean, which does not grow
    with them if the logits are centred.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._series import exactly

PAPER = "Wortsman et al. 2023 (arXiv 2309.14322) sec. 3.1.2"


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Losses whose log Z is far out and on its way further."""
    block = window["log_z.mean"]
    value, has = block["log_z.mean"], block.has("log_z.mean")
    above, known = exactly(window["log_z.excess"], block.steps, block.modules)
    size = int(p["window"])
    judged = has & ~np.isnan(value)
    low, high = judged & (value < p["low"]), judged & known & (above > p["high"])
    threshold = np.where(low, p["low"], value - above + p["high"])
    change = np.full(value.shape, np.nan)
    mask = np.zeros_like(judged)
    for row, module in zip(*np.nonzero(low | high), strict=True):
        if row + 1 < size or block.steps[row] - block.steps[row + 1 - size] < p["steps"]:
            continue
        last = slice(row + 1 - size, row + 1)
        quarters = [
            x[ok].mean() if ok.any() else np.nan
            for x, ok in zip(
                value[last, module].reshape(4, -1),
                (judged & np.isfinite(value))[last, module].reshape(4, -1),
                strict=True,
            )
        ]
        step = np.diff(quarters)
        mask[row, module] = bool((step < 0).all()) if low[row, module] else bool((step > 0).all())
        change[row, module] = quarters[-1] - quarters[0]
    yield Hits(block.steps, block.modules, mask, judged, value, threshold, {"change": change})


RULE = Rule(
    id="logit_drift",
    title="Output logit drift",
    severity="warning",
    site="logits",
    message="The mean log Z of {module} is {value:.1f} and still moving away ({change:+.1f} within 1,000 steps).",
    refute="a shift of all logits is part of the model, or log Z levels off",
    remedies=(
        Remedy("add a z-loss of 1e-4 to the cross-entropy", "monitor.remedies.z_loss"),
        Remedy("use weight decay on the output layer"),
    ),
    params=(
        Param("low", -5, "nats", f"own choice; {PAPER} reports very negative logits before a divergence"),
        Param("high", 20, "nats", "own choice: above ln K"),
        Param("window", 200, "points", "own choice: 1,000 steps at the default cadence"),
        Param("steps", 900, "steps", "own choice: least length of the window"),
    ),
    needs=("log_z.mean", "log_z.excess"),
    check=check,
    lookback=200,
    hold=3,
    doc=__doc__ or "",
)
