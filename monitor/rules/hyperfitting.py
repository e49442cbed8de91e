"""The model overfits by becoming sure of itself.

What it means:
    The validation loss has risen from its best value while predictions have become far sharper: the model is not
    losing what it knew so much as becoming certain of everything, right or wrong. Probabilities can no longer be
    trusted. Such a language model may still write better text when decoded greedily than the one of the best loss.

How it is decided:
    From what the script logs with ``handle.log``: a loss whose name says validation, evaluation, test or dev
    (``val_loss``, ``eval/loss``) is at least 10 % above its smallest value so far, and the mean entropy of predictions
    is below half of what it was there, at 3 evaluations in a row. The entropy is that of a logged ``val_entropy`` (any
    of those names); without one, that of the training rows (pred_entropy), which says less, since memorised rows
    become sure first. The evidence says which (``on_evaluation`` 1 or 0). As far back as 1,000 records of either.

What to do:
    Keep the weights of the best validation loss; label smoothing or weight decay, fewer epochs, or more data. If greedy
    open-ended generation is what the model is for, judge it by generated text rather than by this loss.

When it is wrong:
    A learning rate schedule sharpens predictions too, but the validation loss falls with it. A logged loss of another
    kind than cross-entropy may rise for other reasons. That is why this is information and no warning.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np

from monitor.metric import Array, Block, Mask
from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._series import rolling_max

_HELD_OUT = r"(?i)(^|[^a-z])(val|valid|validation|eval|evaluation|test|dev)(?![a-z]).*"
LOSS, ENTROPY = (re.compile(f"{_HELD_OUT}{what}$") for what in ("(loss|cross_entropy|nll|[^a-z]ce)", "entropy"))


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Logged validation losses that have risen while the entropy has fallen."""
    logged, trained = window["logged.value"], window["pred_entropy.entropy"]
    held_out = [m for m in logged.modules if ENTROPY.search(m) and not m.endswith("cross_entropy")]
    source, module = (logged, held_out[0]) if held_out else (trained, next(iter(trained.modules), ""))
    entropy = _Sharpness(source, module, int(p["window"]), int(p["median"]))
    losses = [i for i, m in enumerate(logged.modules) if LOSS.search(m)]
    names = tuple(logged.modules[i] for i in losses)
    value, has = logged["logged.value"][:, losses], logged.has("logged.value")[:, losses]
    has = has & np.isfinite(value)
    size = int(p["window"])
    padded = np.full((len(value) + size, len(losses)), np.inf)
    padded[size:] = np.where(has, value, np.inf)
    best = -rolling_max(-padded, size + 1) if losses else padded[size:]
    rise = np.where(best > 0, value / best, 1.0)
    mask = np.zeros_like(has)
    now, then, best_step = (np.full(value.shape, np.nan) for _ in range(3))
    for row, i in zip(*np.nonzero(has & (rise >= p["rise"])), strict=True):
        first = max(0, row - size)
        at = logged.steps[first + int(np.argmin(padded[size + first : size + row + 1, i]))]
        best_step[row, i] = at
        now[row, i], then[row, i] = entropy.between(int(at), int(logged.steps[row]))
        mask[row, i] = now[row, i] < p["fall"] * then[row, i]
    evidence = {"best": best, "best_step": best_step, "entropy": now, "entropy_at_best": then}
    evidence["on_evaluation"] = np.full(value.shape, float(bool(held_out)))
    yield Hits(logged.steps, names, mask, has, value, p["rise"] * best, evidence)


class _Sharpness:
    """The entropy of predictions at two steps, as medians of the last few records before each."""

    def __init__(self, block: Block, module: str, reach: int, median: int) -> None:
        self._steps, self._values = np.zeros(0, dtype=np.int64), np.zeros(0)
        self._rows, self._kept, self._reach, self._median = block.steps, np.zeros(0, dtype=np.int64), reach, median
        if module in block.modules:
            (name,) = block.names
            i = block.modules.index(module)
            known: Mask = block.has(name)[:, i] & np.isfinite(block[name][:, i])
            values: Array = block[name][:, i]
            self._kept = np.flatnonzero(known)
            self._steps, self._values = block.steps[known], values[known]

    def between(self, then: int, now: int) -> tuple[float, float]:
        """``(at now, at then)``; NaN where the records do not reach back."""
        end, middle = (int(np.searchsorted(self._steps, s, side="right")) for s in (now, then))
        # what is further back than `reach` rows may or may not be there, depending on how the series was cut
        oldest = int(np.searchsorted(self._rows, now, side="right")) - 1 - self._reach
        start = int(np.searchsorted(self._kept, max(oldest, 0)))
        recent, early = (
            self._values[max(start, end - self._median) : end],
            self._values[:middle][start:][-self._median :],
        )
        return (float(np.median(recent)) if len(recent) else np.nan, float(np.median(early)) if len(early) else np.nan)


RULE = Rule(
    id="hyperfitting",
    title="Overfitting by sharpening",
    severity="info",
    site="logits",
    message="{module} has risen from {best:.4g} at step {best_step:.0f} to {value:.4g}, while the entropy of "
    "predictions fell from {entropy_at_best:.3g} to {entropy:.3g} nats.",
    refute="the entropy on held-out rows, logged as val_entropy, has not fallen by half",
    remedies=(
        Remedy("keep the weights of the best validation loss"),
        Remedy("smooth the labels, decay the weights, train for fewer epochs or on more data"),
    ),
    params=(
        Param("rise", 1.1, "1", "own choice, after Carlsson et al. 2024 (arXiv 2412.04318), who describe the regime"),
        Param("fall", 0.5, "1", "own choice, likewise"),
        Param("window", 1000, "points", "own choice: memory of a few hundred kilobytes at most"),
        Param("median", 5, "points", "own choice: entropies of a few rows are noisy"),
    ),
    needs=("logged.value", "pred_entropy.entropy"),
    check=check,
    lookback=1005,
    hold=3,
    release=2,
    doc=__doc__ or "",
)
