"""The classifier does no better than guessing, and has not for hundreds of steps.

What it means:
    The loss is that of answering every row alike, and about as many rows are right as by chance: nothing has been
    learned, or nothing is left of it. Or the loss is negative, and the model is sure of its answers and no more often
    right than by chance: then training runs uphill, because the sign of its loss is wrong.

How it is decided:
    Over the last 200 recorded losses the mean is between 98 % and 125 % of ln K, the loss of guessing among K classes,
    and at most 1.25 / K of the rows were right; or it is below 0, as few were right, and the mean largest probability
    was above 0.9. For 10 points, not while the learning rate rises, and only where one loss is trained on in which
    cross-entropies were seen.

What to do:
    Read the evidence. Parameters that do not move: dead units, weights that are all 0, a tensor that was detached, a
    learning rate of 0. A median relative update below 1e-5: the learning rate, the clipping threshold or the schedule
    leaves nothing. Above 0.1: the learning rate is too large, or inputs are not normalised. In between: labels that do
    not belong to their rows, or layers that let no signal through. Then train on one batch for ever: a model that
    cannot learn 64 rows by heart has a bug, not a hard task.

When it is wrong:
    Some tasks begin with a long plateau (parity, copying over a distance), and some can hardly be predicted at all.
    Reinforcement learning on a cross-entropy times a return near 1 looks the same. Where classes are of unequal size,
    guessing the largest is better than this and is not found.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from monitor.metric import Array, Block
from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._series import ODD, Steps, exactly, filled, latest

WINDOW = 200
ACCURACY, SURE = "train_accuracy.accuracy", "train_accuracy.top1_mass"
RATIO, CHANGE = "update_ratio.ratio", "update_ratio.update_norm"
#: Log Z of this size and more has no ln K left in it: it is float32.
_LARGE = 1e5


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Losses that end a stretch of guessing."""
    block, rates = window["loss.value"], window["learning_rate.lr"]
    start = int(np.searchsorted(block.steps, window.first))
    steps, modules = block.steps[start:], block.modules
    value = _means(block, steps)
    # of several losses it is not known which one a cross-entropy belongs to
    has = np.isfinite(value) & (len(modules) == 1)
    right = _means(window[ACCURACY], steps)
    seen = window[ACCURACY].modules
    logarithm = _classes(window, steps, seen)
    classes = np.rint(np.exp(logarithm))
    times = right * classes
    known = np.isfinite(times)
    guess = np.min(logarithm, axis=1, keepdims=True, initial=np.inf, where=known)
    best = np.max(times, axis=1, keepdims=True, initial=-np.inf, where=known)
    then = block.steps[np.maximum(np.arange(start, len(block.steps)) + 1 - WINDOW, 0)]
    rising = latest(rates, steps, rates.modules)[0] > p["rising"] * latest(rates, then, rates.modules)[0]
    has &= known.any(axis=1, keepdims=True) & ~rising.any(axis=1, keepdims=True)
    guessing = (value >= p["loss"] * guess) & (value <= p["most"] * guess) & (best <= p["right"])
    sure = _means(window[SURE], steps).min(axis=1, keepdims=True, initial=np.inf)
    uphill = (value < 0) & (best <= p["right"]) & (sure >= p["sure"])
    mask = has & (guessing | uphill)
    evidence = {}
    if mask.any():
        fewest = np.where(known, classes, np.inf).min(axis=1, keepdims=True, initial=np.inf)
        evidence = {"accuracy": best / fewest, "guess": guess, "classes": fewest} | _movement(window, steps)
    yield Hits(steps, modules, mask, has, value, p["loss"] * guess, evidence)


def _means(block: Block, steps: Steps) -> Array:
    """Mean of the last `WINDOW` rows at or before each step, ``(step, module)``; NaN where one is missing."""
    (name,) = block.names
    values = np.where(block.has(name), block[name], np.nan).T
    found = np.full((len(steps), len(block.modules)), np.nan)
    end = np.searchsorted(block.steps, steps, side="right")
    enough: npt.NDArray[np.bool_] = end >= WINDOW
    if enough.any():
        stretches = np.lib.stride_tricks.sliding_window_view(values, WINDOW, axis=1)
        # a copy is contiguous, so that a mean does not depend on how the series was cut
        found[enough] = np.ascontiguousarray(stretches[:, end[enough] - WINDOW]).mean(axis=2).T
    return found


def _classes(window: Window, steps: Steps, modules: tuple[str, ...]) -> Array:
    """The logarithm of the number of classes of each cross-entropy, ``(step, module)``; NaN where it is not known."""
    block = window["log_z.mean"]
    level, has = block["log_z.mean"], block.has("log_z.mean")
    excess, known = exactly(window["log_z.excess"], block.steps, block.modules)
    readable = has & known & (np.abs(level) < _LARGE)
    given = Block(block.steps, block.modules, {"ln": level - excess}, {"ln": readable})
    last = np.full((len(block.steps), len(modules)), np.nan)
    for i, module in enumerate(modules):
        if module in block.modules:
            last[:, i] = filled(given, module, WINDOW - 1)
    return latest(Block(block.steps, modules, {"ln": last}), steps, modules)[0]


def _movement(window: Window, steps: Steps) -> dict[str, Array]:
    """How many parameters there are, how many of them stand still, and how much the median one moves."""
    change, has = latest(window[CHANGE], steps, window[CHANGE].modules)
    ratio, _ = latest(window[RATIO], steps, window[CHANGE].modules)
    still = has & (change == 0)
    ratio = np.where(has, np.where(still, 0.0, ratio), np.nan)
    median, known = np.full(len(steps), np.nan), ~np.isnan(ratio).all(axis=1)
    median[known] = np.nanmedian(ratio[known], axis=1)
    some = has.any(axis=1)
    numbers = {"parameters": has.sum(axis=1), "still": still.sum(axis=1), "update": median}
    return {name: np.where(some, x, np.nan)[:, None] for name, x in numbers.items()}


RULE = Rule(
    id="no_better_than_guessing",
    title="No better than guessing",
    severity="warning",
    site="loss",
    message="The loss is {value:.4g} and {accuracy:.1%} of the training rows are right: guessing among {classes:.0f} "
    "classes gives {guess:.4g}. {still:.0f} of {parameters:.0f} parameters do not move at all; the median relative "
    "update is {update:.2g}.",
    refute="the task is known to begin with a plateau, or nothing could predict these targets",
    remedies=(
        Remedy("if the loss is negative, turn its sign; else train on one batch for ever: its loss must go to 0"),
        Remedy("parameters that do not move: look for dead units, weights of 0, detach(), a learning rate of 0"),
        Remedy("relative updates below 1e-5: raise the learning rate or the clipping threshold, look at the schedule"),
        Remedy("relative updates above 0.1: lower the learning rate, normalise the inputs"),
        Remedy("else check that labels belong to their rows"),
    ),
    params=(
        Param("loss", 0.98, "of ln K", "own choice: what is learned first, the classes' shares, often takes more off"),
        Param(
            "most", 1.25, "of ln K", "own choice: a cross-entropy times a return, or one term of several, is outside"
        ),
        Param("right", 1.25, "of 1 / K", "own choice: the largest of ten classes of digits has 1.02 / K"),
        Param("sure", 0.9, "fraction", "own choice: a policy is right about its own actions as often as it is sure"),
        Param("rising", 1.05, "times", "own choice: in a warm-up there is nothing to be seen yet"),
        Param("minimum", WINDOW, "points", f"own choice; {ODD}"),
    ),
    needs=("loss.value", ACCURACY, SURE, "log_z.mean", "log_z.excess", "learning_rate.lr", RATIO, CHANGE),
    check=check,
    lookback=WINDOW,
    hold=10,
    doc=__doc__ or "",
)
