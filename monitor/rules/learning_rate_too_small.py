"""The learning rate is far below what the curvature allows, has been for long, and the loss creeps.

What it means:
    The steps are less than a thousandth of what would still be stable, although the loss is falling all the time and
    the landscape has not become flatter: training would be faster with a larger learning rate.

How it is decided:
    The last 20 measurements of `edge_of_stability` are all below 0.001; over them the loss has fallen by 1 % or more
    and the sharpness not by 20 % (second half against first, medians); and the learning rate has been the same. The
    sharpness of a small batch is above that of all the data, so for small batches the ratio is if anything too high.
    Not judged where groups have different learning rates, nor where another loss than that of the step was given to be
    measured.

What to do:
    Raise the learning rate, by 3 to 10 times at first; `stable_lr` is a limit for the batch, not a recommendation.

When it is wrong:
    Fine-tuning, where small steps are the point. Along most directions a much smaller curvature may still forbid no
    more than this one does: the sharpest direction tells what is unstable, not what is fast.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._curvature import CALIBRATION, OF_STEP, at, before, of_step

RATIO = "edge_of_stability.ratio"


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Measurements that end a long stretch of small ratios."""
    steps = window[RATIO].steps
    n = int(p["minimum"])
    ratio, has = at(window, RATIO, steps)
    loss, known = at(window, "sharpness.loss", steps)
    stable = at(window, "edge_of_stability.stable_lr", steps)[0]
    rate = stable * ratio  # by definition
    stretch = {name: _stretch(x, n) for name, x in (("ratio", ratio), ("loss", loss), ("rate", rate))}
    sharp = _stretch(at(window, "sharpness.value", steps)[0], n)
    highest = stretch["ratio"].max(axis=1, keepdims=True)  # NaN if one is, or if there are not enough
    fall = 1 - _half(stretch["loss"], late=True) / _half(stretch["loss"], late=False)
    constant = stretch["rate"].max(axis=1) <= (1 + p["change"]) * stretch["rate"].min(axis=1)
    as_sharp = _half(sharp, late=True) >= p["as_sharp"] * _half(sharp, late=False)
    has = has & known & np.isfinite(highest) & of_step(window, steps)
    mask = has & (highest < p["ratio"]) & (fall >= p["fall"]) & constant[:, None] & as_sharp
    evidence = {"stable_lr": stable, "lr": rate, "loss": loss}
    yield Hits(steps, ("",), mask, has, highest, p["ratio"], evidence)


def _stretch(values: np.ndarray, n: int) -> np.ndarray:
    """Each point with the ``n - 1`` before it, ``(point, n)``."""
    return np.concatenate([before(values, n - 1), values], axis=1)


def _half(stretch: np.ndarray, *, late: bool) -> np.ndarray:
    middle = stretch.shape[1] // 2
    return np.median(stretch[:, middle:] if late else stretch[:, :middle], axis=1, keepdims=True)


RULE = Rule(
    id="learning_rate_too_small",
    title="Learning rate far below what is stable",
    severity="info",
    site="loss",
    message="For 20 measurements the steps were at most {value:.2g} of what the curvature allows; the loss creeps.",
    refute="a run with three times the learning rate is no faster",
    remedies=(Remedy("raise the learning rate, by 3 to 10 times at first"),),
    params=(
        Param(
            "ratio", 0.001, "of the edge", f"{CALIBRATION}: at good rates from 0.015 up, a tenth of that still trains"
        ),
        Param("minimum", 20, "measurements", "own choice"),
        Param("fall", 0.01, "fraction of the loss", "own choice: less may be noise, or the end"),
        Param(
            "as_sharp", 0.8, "of the sharpness before", f"{CALIBRATION}: where rows are learnt it falls, at any rate"
        ),
        Param("change", 0.05, "fraction of the learning rate", "own choice: a schedule sets its own pace"),
    ),
    needs=(RATIO, "edge_of_stability.stable_lr", "sharpness.loss", "sharpness.value", OF_STEP),
    check=check,
    lookback=20,
    release=5,
    doc=__doc__ or "",
)
