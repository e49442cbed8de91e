"""The learning rate goes up and down again and again, within so few steps that it looks like a mistake.

What it means:
    A schedule of half a cosine, from the full rate to nothing, does not stop at its end: stepped on, it rises as it
    fell. With a length given in epochs and a step at every batch it goes through many periods instead of half of one,
    and the training ends wherever it happens to be then.

How it is decided:
    Within the last 1,000 steps the learning rate of a group had 5 maxima or more, fell to a twentieth of its largest
    value or less, and rose in 30 to 70 % of the steps in which it moved: schedules with restarts jump up at once, and
    cyclic ones are slower or do not go as far down.

What to do:
    `CosineAnnealingLR`: give ``T_max`` in batches, or call `scheduler.step()` once per epoch.

When it is wrong:
    The cycles are wanted. That is why this is information and no warning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from monitor.metric import Array, Mask
from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._series import rolling_max

RATE = "learning_rate.lr"
MEMORY = 1000


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Steps that end a stretch of many periods."""
    block = window[RATE]
    has = block.has(RATE) & np.isfinite(block[RATE])
    rate = np.where(has, block[RATE], np.nan)
    change = np.diff(rate, axis=0, prepend=rate[:1])
    up, down = change > 0, change < 0
    tops = np.zeros_like(up)
    tops[1:] = up[:-1] & down[1:]
    many, rises, moves = _count(tops), _count(up), _count(up | down)
    highest, lowest = (sign * _largest(np.where(has, sign * rate, -np.inf)) for sign in (1, -1))
    share = rises / np.maximum(moves, 1)
    mask = has & (many >= p["maxima"]) & (lowest <= p["low"] * highest)
    mask &= (share >= p["rising"]) & (share <= 1 - p["rising"])
    evidence = {"period": moves / np.maximum(many, 1), "low": lowest, "high": highest}
    yield Hits(block.steps, block.modules, mask, has, many, p["maxima"], evidence)


def _count(flags: Mask) -> Array:
    """How many there were in the last `MEMORY` rows, ``(step, module)``."""
    total = np.cumsum(flags, axis=0, dtype=np.float64)
    total[MEMORY:] = total[MEMORY:] - total[:-MEMORY]
    return total


def _largest(values: Array) -> Array:
    """The largest of the last `MEMORY` rows, ``(step, module)``."""
    before = np.full((MEMORY - 1, values.shape[1]), -np.inf)
    return rolling_max(np.concatenate([before, values]), MEMORY)


RULE = Rule(
    id="learning_rate_cycles",
    title="Learning rate in short cycles",
    severity="info",
    site="update",
    message="The learning rate of {module} went from {high:.2g} to {low:.2g} and back {value:.0f} times, every "
    "{period:.0f} steps.",
    refute="a cyclic schedule of this period was asked for",
    remedies=(Remedy("CosineAnnealingLR: give T_max in batches, or call scheduler.step() once per epoch"),),
    params=(
        Param("maxima", 5, "maxima", "own choice"),
        Param("low", 0.05, "of the largest", "own choice: torch's CyclicLR is rarely given less than a tenth"),
        Param("rising", 0.3, "of the moves", "own choice: half in a cosine or a triangle, next to none in restarts"),
    ),
    needs=(RATE,),
    check=check,
    lookback=MEMORY + 2,
    doc=__doc__ or "",
)
