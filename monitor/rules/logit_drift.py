"""The output logits drift away together.

What it means:
    The softmax does not see a constant added to all logits, so nothing but weight decay or a z-loss holds their common
    level. Late in long trainings without either it has been seen to run away, mostly downwards, until rounding at that
    level spoils the probabilities and the training diverges.

How it is decided:
    The mean of log Z (log of the sum of exponentials) is below −5, or more than 20 nats above that of zero logits,
    ln K, and over the last 200 points (1,000 steps) the means of the four quarters of them go one way, away from 0. The
    mean of all logits goes with it by at least half as much: growing margins raise log Z too, but not all logits.

What to do:
    A z-loss of 1e-4 beside the cross-entropy, or weight decay on the output layer.

When it is wrong:
    Logits that a model shifts by design.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from monitor.metric import Array, Mask
from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._series import exactly

PAPER = "Wortsman et al. 2023 (arXiv 2309.14322) sec. 3.1.2"


def _quarters(values: Array, has: Mask, rows: slice, module: int) -> Array:
    """Means of the four quarters of ``rows``, ``(4,)``; NaN where a quarter has no finite value."""
    given, ok = values[rows, module].reshape(4, -1), (has & np.isfinite(values))[rows, module].reshape(4, -1)
    return np.array([x[some].mean() if some.any() else np.nan for x, some in zip(given, ok, strict=True)])


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Losses whose log Z is far out and on its way further."""
    block = window["log_z.mean"]
    value, has = block["log_z.mean"], block.has("log_z.mean")
    above, known = exactly(window["log_z.excess"], block.steps, block.modules)
    level, level_has = exactly(window["logit_scale.mean"], block.steps, block.modules)
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
        quarters = _quarters(value, judged, last, module)
        step = np.diff(quarters)
        change[row, module] = quarters[-1] - quarters[0]
        levels = _quarters(level, level_has, last, module)
        away = bool((step < 0).all()) if low[row, module] else bool((step > 0).all())
        mask[row, module] = away and (levels[-1] - levels[0]) / change[row, module] >= p["shared"]
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
        Param(
            "shared", 0.5, "of the change", "own choice: a shift of all logits gives 1, growing margins none or little"
        ),
        Param("steps", 900, "steps", "own choice: least length of the window"),
    ),
    needs=("log_z.mean", "log_z.excess", "logit_scale.mean"),
    check=check,
    lookback=200,
    hold=3,
    doc=__doc__ or "",
)
