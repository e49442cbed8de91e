"""The held-out loss has turned and rises, while the training loss goes on falling.

What it means:
    What is learned from here on holds for the training rows alone: for other data the model was best some time ago.

How it is decided:
    From losses that the script logs under a name for held-out data (``val_loss``, ``eval/loss``), or that were found
    of its evaluations (``eval_loss``): at 3 evaluations in a row it is at least 10 % above the best it has been, a
    median of three evaluations. Where classes are predicted, the best was in turn 5 % better than one before: what
    never held for other data cannot be lost. Since then the mean of the last 50 training losses has fallen by 10 %, or
    it lies 10 % below that best and has not risen. As far back as 1,000 records of either. Where predictions have
    become sure at the same time, hyperfitting says so instead; where the training rows are memorised and the others
    are not understood, grokking_phase does.

What to do:
    Keep the weights of the best evaluation, whose step is in the evidence. Then more data or augmentation, dropout,
    weight decay, a smaller model, fewer epochs.

When it is wrong:
    The loss may rise while the accuracy still does: wrong answers become surer. What is deployed by its accuracy is
    then better at the end. A training loss of several terms may fall by another of them. That is why this is
    information and no warning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from monitor.metric import Array, Block
from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules import hyperfitting
from monitor.rules._series import ACCURACIES, Steps, accuracies, logged_as, rolling_max

LOGGED, LOSS = "logged.value", "loss.value"
#: Evaluations of which the best is a median, and training losses of which a mean is taken; early on of fewer.
COMPANY, MEAN, LEAST = 3, 50, 10


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Held-out losses that have risen while the training loss has fallen."""
    logged, size = window[LOGGED], int(p["window"])
    names = tuple(logged_as(logged.modules, "loss"))
    at = [logged.modules.index(name) for name in names]
    value = logged[LOGGED][:, at]
    has = logged.has(LOGGED)[:, at] & np.isfinite(value)
    lowest = np.full((len(value) + size, len(names)), np.inf)
    lowest[size:] = np.where(has, value, np.inf)
    lowest = -rolling_max(-lowest, size + 1) if names else lowest[size:]
    maybe = has & (lowest > 0) & (value >= p["rise"] * lowest)  # no median of three is below the lowest of them
    mask, judged = np.zeros_like(has), has
    evidence = {name: np.full(value.shape, np.nan) for name in ("best", "best_step", "train_then", "train")}
    if maybe.any():
        train = _Training(window[LOSS], size)
        learned = p["learned"] if window["pred_entropy.entropy"].modules else 0.0
        for i in np.flatnonzero(maybe.any(axis=0)):
            past = _Past(np.flatnonzero(has[:, i]), value[:, i], size)
            for row in np.flatnonzero(maybe[:, i] & (logged.steps >= window.first)):
                at_best, best, before = past.best(int(row))
                if not (value[row, i] >= p["rise"] * best and before >= learned * best):
                    continue
                step = logged.steps[at_best]
                then, now = train.between(int(step), int(logged.steps[row]))
                mask[row, i] = now <= p["fall"] * then or (now <= p["fall"] * best and now <= then)
                for name, x in zip(evidence, (best, step, then, now), strict=True):
                    evidence[name][row, i] = x
        if mask.any():
            told = mask & _told_otherwise(window, logged.steps, names)
            mask, judged = mask & ~told, has & ~told
    yield Hits(logged.steps, names, mask, judged, value, p["rise"] * evidence["best"], evidence)


class _Past:
    """The evaluations of one name: the ``rows`` that hold one, and medians of each with the two after it."""

    def __init__(self, rows: npt.NDArray[np.int64], values: Array, reach: int) -> None:
        self._rows, self._values, self._reach = rows, values[rows], reach
        few = len(rows) < COMPANY
        triples = np.lib.stride_tricks.sliding_window_view(self._values, 1 if few else COMPANY)
        self._medians = np.median(triples, axis=1)

    def best(self, row: int) -> tuple[int, float, float]:
        """Where the best was before ``row``, the median of those around it, the largest up to it; NaN if too few."""
        first = int(np.searchsorted(self._rows, row - self._reach))
        end = int(np.searchsorted(self._rows, row))
        if end - first < COMPANY:
            return row, np.nan, np.nan
        at = first + int(np.argmin(self._medians[first : end - COMPANY + 1]))
        best = at + int(np.argmin(self._values[at : at + COMPANY]))
        return int(self._rows[best]), float(self._medians[at]), float(self._values[first : best + 1].max())


def _told_otherwise(window: Window, steps: Steps, names: tuple[str, ...]) -> npt.NDArray[np.bool_]:
    """Where another rule speaks of the same, ``(step, name)``."""
    (sharper,) = hyperfitting.check(window, hyperfitting.RULE.values)
    told = np.zeros((len(steps), len(names)), dtype=np.bool_)
    for i, name in enumerate(names):
        if name in sharper.modules:
            told[:, i] = sharper.mask[:, sharper.modules.index(name)]
    _, _, train, held = accuracies(window)
    return told | ((train >= 0.99) & (train - held > 0.3)).any(axis=1, keepdims=True)


class _Training:
    """Means of a few training losses before a step."""

    def __init__(self, block: Block, reach: int) -> None:
        one = len(block.modules) == 1  # of several it is not known which is meant
        kept = block.has(LOSS)[:, 0] & np.isfinite(block[LOSS][:, 0]) if one else np.zeros(0, dtype=np.bool_)
        self._steps = block.steps[kept] if one else block.steps[:0]
        self._values = block[LOSS][kept, 0] if one else np.zeros(0)
        self._reach = reach

    def between(self, then: int, now: int) -> tuple[float, float]:
        """``(around then, up to now)``, the former no further back than the reach; NaN if there are too few."""
        end = int(np.searchsorted(self._steps, now, side="right"))
        middle = max(int(np.searchsorted(self._steps, then, side="right")), end - self._reach + MEAN)
        early = self._values[max(middle - MEAN, 0) : middle]
        if len(early) < LEAST or end - middle < MEAN:
            return np.nan, np.nan
        return float(early.mean()), float(self._values[end - MEAN : end].mean())


RULE = Rule(
    id="overfitting",
    title="Overfitting",
    severity="info",
    site="loss",
    message="{module} is {value:.4g} and was {best:.4g} around step {best_step:.0f}; the training loss has gone from "
    "{train_then:.4g} to {train:.4g} since.",
    refute="the accuracy on the same held-out data still rises, and is what matters",
    remedies=(
        Remedy("keep the weights of the best evaluation"),
        Remedy("more data or augmentation, dropout, weight decay, a smaller model, fewer epochs"),
    ),
    params=(
        Param("rise", 1.1, "times the best", "own choice, as in hyperfitting"),
        Param("learned", 1.05, "times the best", "own choice: what never was better than at first has not turned"),
        Param("fall", 0.9, "of the training loss", "own choice"),
        Param("window", 1000, "points", "own choice: memory of a few hundred kilobytes at most"),
    ),
    needs=(LOGGED, LOSS, "pred_entropy.entropy", *ACCURACIES[1:]),
    check=check,
    lookback=1005,
    hold=3,
    release=2,
    doc=__doc__ or "",
)
