"""Every update is made by an optimizer that was made for it.

What it means:
    The optimizer is constructed inside the loop. What it should remember, momentum and the size of past gradients, is
    thrown away with it after each update: Adam then moves every element by the whole learning rate whatever its
    gradient, and SGD has no momentum. Such a training learns, less well than it could, and a schedule that was given
    the first optimizer has no effect.

How it is decided:
    At 15 looks in a row, which take in every update, no optimizer that made one had made one before, though it keeps a
    value for each element of its parameters.

What to do:
    Construct the optimizer once, before the loop, after the model has been moved to its device.

When it is wrong:
    A method that adapts a model to each batch with a single update from the same beginning (meta-learning), if that is
    what is recorded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._series import exactly

UPDATES, REMEMBERS = "optimizer_age.updates", "optimizer_age.remembers"


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Steps whose optimizers are all new."""
    block = window[UPDATES]
    value, has = block[UPDATES], block.has(UPDATES)
    remembers = exactly(window[REMEMBERS], block.steps, block.modules)[0]
    mask = has & (value <= p["limit"]) & (remembers == 1)
    yield Hits(block.steps, block.modules, mask, has & ~np.isnan(remembers), value, p["limit"])


RULE = Rule(
    id="optimizer_made_anew",
    title="Optimizer made anew for every update",
    severity="warning",
    site="update",
    message="No optimizer of this step had made an update before, though it keeps a memory of them.",
    refute="the optimizer is constructed before the loop, or has nothing to remember",
    remedies=(Remedy("construct the optimizer once, before the loop"),),
    params=(Param("limit", 1, "updates", "definition: its first update is its only one"),),
    needs=(UPDATES, REMEMBERS),
    check=check,
    lookback=1,
    hold=15,
    release=1,
    doc=__doc__ or "",
)
