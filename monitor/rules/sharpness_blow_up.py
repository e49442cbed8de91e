"""The curvature of the loss has jumped by more than a factor of ten.

What it means:
    Within a few measurements the sharpest direction of the loss became more than ten times as sharp as it had been.
    What was a stable learning rate may be far above the edge now; the next steps decide between a catapult and
    divergence.

How it is decided:
    The sharpness is above ten times the largest of the eight measurements before it, of which at least five are finite.
    A value that is not a number is not judged: gradients that are not finite are found by their own rule.

What to do:
    See what happened in the same incident: a new batch, a raised learning rate, collapsed attention. Lower the learning
    rate or clip the gradient norm until the sharpness has come down.

When it is wrong:
    Batches that differ very much in kind (or in the number of rows) differ in sharpness too. Slow growth by any factor
    is progressive sharpening, and not found.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._curvature import CALIBRATION, at, before

VALUE = "sharpness.value"


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Values far above all of the last few."""
    steps = window[VALUE].steps
    value, has = at(window, VALUE, steps)
    usable = np.where(has & (value > 0), value, np.nan)
    earlier = before(usable, int(p["measurements"]))
    enough = (np.isfinite(earlier).sum(axis=1) >= p["minimum"])[:, None]
    highest = np.max(np.where(np.isnan(earlier), -np.inf, earlier), axis=1, keepdims=True)
    times = value / highest
    has = has & enough & ~np.isnan(value)
    mask = has & (times > p["times"])
    evidence = {"sharpness": value, "highest_before": np.where(enough, highest, np.nan)}
    yield Hits(steps, ("",), mask, has, times, p["times"], evidence)


RULE = Rule(
    id="sharpness_blow_up",
    title="Sharpness blow-up",
    severity="warning",
    site="loss",
    message="The sharpness jumped to {sharpness:.4g}, {value:.3g} times what it had been.",
    refute="the batch of this step is of another kind or size than those before",
    remedies=(
        Remedy("lower the learning rate, or clip the gradient norm"),
        Remedy("look at the batch of this step"),
    ),
    params=(
        Param("times", 10, "of the largest before", f"{CALIBRATION}: at most 2.1 in healthy ones"),
        Param("measurements", 8, "measurements", "own choice"),
        Param("minimum", 5, "measurements", f"{CALIBRATION}: with 3 the first rise of a healthy one counted"),
    ),
    needs=(VALUE,),
    check=check,
    lookback=8,
    release=5,
    doc=__doc__ or "",
)
