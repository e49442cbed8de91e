"""The loss rose far above its best level and stayed there.

What it means:
    Training has lost what it had learned: not one bad batch, but twenty points in a row. It may come back, as it does
    after a learning rate that was too high for a while, but what came before is gone.

How it is decided:
    The level of a point is the median of the last 20 losses. Where a classification loss was seen and there is one
    optimizer, the level must exceed the lowest level of the last 1,000 points by one nat and by half of it. For other
    losses, whose unit is unknown and which may rise in health (adversarial, reinforcement), it must be 10 times the
    median size of the last 1,000 losses and above 95 % of them. Either for 10 points.

What to do:
    Return to a checkpoint from before the first step and look at what stands before it in the same incident. Then a
    lower learning rate, a longer warm-up, gradient clipping, or a larger Adam epsilon.

When it is wrong:
    A change of data or of the loss on purpose moves the level for good reason. A rise that is slow or small is not
    found: over-fitting does not show in the training loss. After 1,000 points at the new level, that is the level.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from monitor.metric import Array, Mask
from monitor.robust import baseline
from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._series import CALIBRATION, latest, rolling_max


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Levels of the loss far above the best or the usual one."""
    block = window["loss.value"]
    loss, has = block["loss.value"], block.has("loss.value") & np.isfinite(block["loss.value"])
    start = int(np.searchsorted(block.steps, window.first))
    steps, modules = block.steps[start:], block.modules
    accuracy = window["train_accuracy.accuracy"]
    accurate, seen = latest(accuracy, steps, accuracy.modules[:1])
    classifies = seen.any(axis=1, keepdims=True) & (len(modules) == 1)

    level = _levels(loss, has, start, p)[start:]
    points = np.cumsum(has, axis=0)[start:]
    known = has[start:] & np.isfinite(level) & (points >= p["minimum"])
    limit, reference = np.full(level.shape, np.inf), np.full(level.shape, np.nan)
    # what the whole block holds can only be lower than what a row may look back at, and is found without sorting
    lowest = np.where(has, loss, np.inf).min(axis=0, initial=np.inf)
    smallest = np.where(has, np.abs(loss), np.inf).min(axis=0, initial=np.inf)
    likely = known & np.where(classifies, level >= lowest + p["nats"], level >= p["times"] * smallest)
    if (likely & classifies).any():
        best = _best(loss, has, start, p)
        higher = np.maximum(best + p["nats"], best * p["part"])
        limit, reference = np.where(classifies, higher, limit), np.where(classifies, best, reference)
    for row, i in np.argwhere(likely & ~classifies):
        before = start + row + 1 - int(p["level"])
        rows = slice(max(before - int(p["window"]), 0), max(before, 0))
        usual = np.sort(np.abs(loss[rows, i][has[rows, i]]))
        if len(usual) < p["level"] / 2:
            continue
        reference[row, i] = usual[len(usual) // 2]
        limit[row, i] = max(p["times"] * reference[row, i], usual[int(p["above"] * len(usual))])
    evidence = {"reference": reference}
    if accurate.shape[1] and len(modules) == 1:
        evidence["accuracy"] = accurate
    yield Hits(steps, modules, known & (level >= limit), known, level, limit, evidence)


def _levels(loss: Array, has: Mask, first: int, p: Mapping[str, float]) -> Array:
    """Median of each row from ``first`` on and the rows before it, NaN where fewer than half of them hold a loss."""
    # a baseline ends before its row, so one row more makes it end with the row
    more = ((0, 1), (0, 0))
    size = int(p["level"])
    return baseline(np.pad(loss, more), np.pad(has, more), first=first + 1, window=size, minimum=size // 2).median[1:]


def _best(loss: Array, has: Mask, start: int, p: Mapping[str, float]) -> Array:
    """The lowest level of each judged row and the rows that it may look back at."""
    size = int(p["window"])
    levels = -_levels(loss, has, 0, p)
    levels = np.pad(np.where(np.isnan(levels), -np.inf, levels), ((size, 0), (0, 0)), constant_values=-np.inf)
    return -rolling_max(levels, size + 1)[start:]


RULE = Rule(
    id="divergence",
    title="Divergence",
    severity="critical",
    site="loss",
    message="The loss stayed around {value:.4g}, where {reference:.4g} had been reached.",
    refute="the data or the loss were changed on purpose at the first step",
    remedies=(
        Remedy("return to a checkpoint from before the first step"),
        Remedy("lower the learning rate or lengthen the warm-up; clip the gradient norm"),
        Remedy("raise Adam's epsilon, or lower its beta2, if gradients had become very small before"),
    ),
    params=(
        Param("nats", 1.0, "nats", CALIBRATION),
        Param("part", 1.5, "times the best level", CALIBRATION),
        Param("times", 10, "times the median", CALIBRATION),
        Param("above", 0.95, "quantile", CALIBRATION),
        Param("level", 20, "points", "own choice: ten bad batches in a row are no level yet"),
        Param("window", 1000, "points", "own choice: the memory of the rule"),
        Param("minimum", 40, "points", "own choice: two levels that do not overlap"),
    ),
    needs=("loss.value", "train_accuracy.accuracy"),
    check=check,
    lookback=1020,
    hold=10,
    doc=__doc__ or "",
)
