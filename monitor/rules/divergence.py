"""The loss rose far above its usual level and stayed there.

What it means:
    Training has lost what it had learned: not one bad batch, but twenty points in a row. It may come back, as it does
    after a learning rate that was too high for a while, but what came before is gone.

How it is decided:
    The level of a point is the median of the last 20 losses; it is compared with the up to 1,000 losses before those.
    Where a classification loss was seen and there is one optimizer, it must exceed their median by one nat, by half
    of it, and by 2 robust standard deviations. For other losses, whose unit is unknown and which may rise in health
    (adversarial, reinforcement), it must be 10 times their median size and above 95 % of them. Either for 10 points.

What to do:
    Return to a checkpoint from before the first step and look at what stands before it in the same incident. Then a
    lower learning rate, a longer warm-up, gradient clipping, or a larger Adam epsilon.

When it is wrong:
    A change of data or of the loss on purpose moves the level for good reason. A rise that is slow or small is not
    found: over-fitting does not show in the training loss. After some 500 points at the new level, that is the usual
    one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from monitor.metric import Array, Mask
from monitor.robust import SIGMA_PER_MAD, baseline
from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._series import CALIBRATION, latest


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Levels of the loss far above the usual one."""
    block = window["loss.value"]
    loss, has = block["loss.value"], block.has("loss.value") & np.isfinite(block["loss.value"])
    start = int(np.searchsorted(block.steps, window.first))
    steps, modules = block.steps[start:], block.modules
    accuracy = window["train_accuracy.accuracy"]
    accurate, seen = latest(accuracy, steps, accuracy.modules[:1])
    classifies = np.any(seen, axis=1) & (len(modules) == 1)

    level = _levels(loss, has, start, int(p["level"]))
    known = has[start:] & np.isfinite(level) & (np.cumsum(has, axis=0)[start:] >= p["minimum"])
    limit, usual = np.full(level.shape, np.inf), np.full(level.shape, np.nan)
    # no median is below the smallest loss of the whole block, which is found without sorting anything
    least = np.where(classifies[:, None], _lowest(loss, has) + p["nats"], p["times"] * _lowest(np.abs(loss), has))
    for row, i in np.argwhere(known & (level >= least)):
        end = start + row + 1 - int(p["level"])
        rows = slice(max(end - int(p["window"]), 0), max(end, 0))
        before = loss[rows, i][has[rows, i]]
        if len(before) < p["level"] / 2:
            continue
        if classifies[row]:
            middle = np.median(before)
            spread = SIGMA_PER_MAD * np.median(np.abs(before - middle))
            limit[row, i] = max(middle + p["nats"], p["part"] * middle, middle + p["sigmas"] * spread)
        else:
            before = np.abs(before)
            middle = np.median(before)
            limit[row, i] = max(p["times"] * middle, np.sort(before)[int(p["above"] * len(before))])
        usual[row, i] = middle
    evidence = {"usual": usual}
    if accurate.shape[1] and len(modules) == 1:
        evidence["accuracy"] = accurate
    # more than the limit: where most losses are exactly 0 both may be 0
    yield Hits(steps, modules, known & (level > limit), known, level, limit, evidence)


def _levels(loss: Array, has: Mask, start: int, size: int) -> Array:
    """Median of each row from ``start`` on and the rows before it, NaN where fewer than half of them hold a loss."""
    # a baseline ends before its row, so one row more makes it end with the row
    more = ((0, 1), (0, 0))
    found = baseline(np.pad(loss, more), np.pad(has, more), first=start + 1, window=size, minimum=size // 2)
    return found.median[start + 1 :]


def _lowest(values: Array, has: Mask) -> Array:
    return np.where(has, values, np.inf).min(axis=0, initial=np.inf)


RULE = Rule(
    id="divergence",
    title="Divergence",
    severity="critical",
    site="loss",
    message="The loss stayed around {value:.4g}, where {usual:.4g} had been usual.",
    refute="the data or the loss were changed on purpose at the first step",
    remedies=(
        Remedy("return to a checkpoint from before the first step"),
        Remedy("lower the learning rate or lengthen the warm-up; clip the gradient norm"),
        Remedy("raise Adam's epsilon, or lower its beta2, if gradients had become very small before"),
    ),
    params=(
        Param("nats", 1.0, "nats", CALIBRATION),
        Param("part", 1.5, "times the median", CALIBRATION),
        Param("sigmas", 2, "robust σ", "7 standard errors of a median of 20 in normal noise"),
        Param("times", 10, "times the median", CALIBRATION),
        Param("above", 0.95, "quantile", CALIBRATION),
        Param("level", 20, "points", "own choice: nine bad batches in a row are no level yet"),
        Param("window", 1000, "points", "own choice: the memory of the rule"),
        Param("minimum", 40, "points", "own choice: two levels that do not overlap"),
    ),
    needs=("loss.value", "train_accuracy.accuracy"),
    check=check,
    lookback=1020,
    hold=10,
    doc=__doc__ or "",
)
