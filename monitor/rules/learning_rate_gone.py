"""The learning rate has all but gone, and most of the run is still to come or has passed since.

What it means:
    A schedule that was meant per epoch is stepped per batch, or it was told too small a number of steps. The learning
    rate has fallen to less than a ten-thousandth of what it was, and what is computed since then changes nothing.

How it is decided:
    The learning rate of a group has been below 1e-4 of the largest it ever had for 200 steps, and for as long as all
    the steps before together. Only in the first 2,000 steps of a run, as far as the memory of the rule goes back; a
    group whose rate was 0 from the beginning is not meant.

What to do:
    Call `scheduler.step()` once per epoch if its numbers are epochs, else give it the number of updates: batches per
    epoch times epochs, divided by the micro-batches of an update.

When it is wrong:
    Training was over, and the schedule knew (a rate that falls where the loss stands still), or the rate of a search
    for one that is good was larger by far. That is why this is information and no warning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from monitor.rule import Hits, Param, Remedy, Rule, Window

RATE = "learning_rate.lr"
MEMORY = 2000


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Steps at which a rate had been next to nothing for half of the run."""
    block = window[RATE]
    rate, has = block[RATE], block.has(RATE) & np.isfinite(block[RATE])
    whole = len(block.steps) > 0 and block.steps[0] == 0  # or it is not known what came before
    has &= whole & (np.arange(len(block.steps)) < MEMORY)[:, None]
    peak = np.maximum.accumulate(np.where(has, rate, 0.0), axis=0)
    low = has & (rate < p["part"] * peak)
    after = block.steps[:, None] + 1
    began = np.maximum.accumulate(np.where(has & ~low, after, 0), axis=0)  # after the last step that was not low
    gone = after - began
    mask = low & (gone >= p["steps"]) & (gone >= began)
    yield Hits(block.steps, block.modules, mask, has, rate, p["part"] * peak, {"peak": peak, "since": began * 1.0})


RULE = Rule(
    id="learning_rate_gone",
    title="Learning rate all but gone",
    severity="info",
    site="update",
    message="The learning rate of {module} is {value:.2g}, after {peak:.2g}, and has been next to nothing since step "
    "{since:.0f}.",
    refute="the loss had come to rest before the learning rate fell",
    remedies=(
        Remedy("call scheduler.step() once per epoch if its numbers are epochs"),
        Remedy("else give the schedule the number of updates: batches times epochs over micro-batches"),
    ),
    params=(
        Param(
            "part", 1e-4, "of the largest", "own choice: cosine and linear schedules are below it for 0.6 % of a run"
        ),
        Param("steps", 200, "steps", "own choice"),
    ),
    needs=(RATE,),
    check=check,
    lookback=MEMORY,
    doc=__doc__ or "",
)
