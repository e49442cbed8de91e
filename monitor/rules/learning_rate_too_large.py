"""The first steps rewrote the weights, and the loss is no better for it.

What it means:
    The learning rate is far too large, or a warm-up is missing: each of the first updates changed the weight matrices
    by a good part of their size, so that what they were initialised to is gone. The weights have since grown until
    the same steps are small for them, saturated units or dead ones are left, and the loss is where it was at the
    beginning, or worse.

How it is decided:
    The mean of update over size (`update_ratio`) over the first 10 steps, or as many as there are yet, is 0.15 or more
    in three quarters of the weight matrices, or more of them; and the mean of the last 50 losses is 90 % of the very
    first or more: for 100 steps in a row, among the first 400. Matrices that start at 0 are in the other quarter:
    their first updates are as large as they are.

What to do:
    Divide the learning rate by 10 to 100, or let it rise from 0 over the first hundreds of steps. A good one changes
    matrices by about 1e-3 of their size in mid-training and rarely by more than 0.1 at first.

When it is wrong:
    A loss that need not fall (adversaries, policies) with weights that start very small. The loss of the first batch
    alone says little where batches differ much.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from monitor.metric import Array, Block
from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._series import Steps

LOSS, RATIO = "loss.value", "update_ratio.ratio"
#: Steps whose updates are looked at, losses of a mean, and the last step that is judged.
EARLY, MEAN, LAST = 10, 50, 400
#: Of them there must be so many.
MATRICES = 2


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Losses no better than the first, after updates as large as the weights."""
    block = window[LOSS]
    loss, has = block[LOSS], block.has(LOSS)
    mean, update = np.full(loss.shape, np.nan), np.full(len(loss), np.nan)
    # of several losses it is not known which one should fall; later the first steps are out of sight
    if len(block.modules) == 1 and block.steps[0] == 0:
        rows = np.arange(1, min(len(loss), LAST) + 1)
        total = np.concatenate([[0.0], np.cumsum(loss[: len(rows), 0])])
        early = np.maximum(rows - MEAN, 0)
        mean[: len(rows), 0] = (total[rows] - total[early]) / (rows - early)
        update = _quarters(window[RATIO], block.steps, window.facts)
    known = has & np.isfinite(mean) & np.isfinite(update)[:, None]
    limit = np.where(known, p["loss"] * loss[:1], np.nan)
    large = np.broadcast_to(update[:, None], mean.shape)
    mask = known & (limit > 0) & (mean >= limit) & (large >= p["update"])
    yield Hits(block.steps, block.modules, mask, known, mean, limit, {"update": large})


def _quarters(block: Block, steps: Steps, facts: Mapping[str, Any]) -> Array:
    """The lower quartile over matrices of the mean relative update of the first steps up to each, ``(step,)``."""
    vectors = {q["name"] for q in facts.get("parameters", ()) if len(q["shape"]) < 2}
    found = np.full(len(steps), np.nan)
    early = np.searchsorted(block.steps, EARLY)
    if not early:
        return found
    ratio = block[RATIO][:early][:, [i for i, m in enumerate(block.modules) if m not in vectors]]
    ratio = ratio[:, np.isfinite(ratio).all(axis=0)]
    if ratio.shape[1] >= MATRICES:
        means = np.cumsum(ratio, axis=0) / np.arange(1, early + 1)[:, None]
        at = np.searchsorted(block.steps[:early], steps, side="right") - 1
        found[at >= 0] = np.percentile(means, 25, axis=1)[at[at >= 0]]
    return found


RULE = Rule(
    id="learning_rate_too_large",
    title="Learning rate far too large",
    severity="warning",
    site="update",
    message="The first updates changed three quarters of the weight matrices by {update:.0%} of their size or more, "
    "and the loss is {value:.4g}: hardly better than before them, or worse.",
    refute="with a tenth of the learning rate the loss is no better either",
    remedies=(
        Remedy("divide the learning rate by 10 to 100"),
        Remedy("let it rise from 0 over the first hundreds of steps"),
    ),
    params=(
        Param(
            "update", 0.15, "of the weights",
            "calibrated on 11 small networks (Adam, RMSprop, SGD; dense, convolutional, recurrent, "
            "attention, low-rank): good rates give at most 0.07, a hundred times as much 0.21 and more",
        ),
        Param("loss", 0.9, "of the first loss", "calibrated likewise: good rates give at most 0.77 at step 100"),
    ),
    needs=(LOSS, RATIO),
    check=check,
    lookback=LAST,
    hold=100,
    doc=__doc__ or "",
)  # fmt: skip
