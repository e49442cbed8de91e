"""The loss lies on a plateau that curves downwards as much as upwards: a saddle, not a minimum.

What it means:
    The loss hardly changes, yet its Hessian has negative eigenvalues about as large as the positive ones. Training has
    not come to an end; it has not begun, or is held at a saddle (weights that are too small, symmetric units, a task
    that is solved in steps). It may leave the plateau by itself.

How it is decided:
    Over the last 4 full measurements, 100 steps or more apart, the most negative node of the spectral density was at
    least half as large as the largest each time, and their losses differ by 2 % at most. Not judged where another loss
    than that of the step was given to be measured.

What to do:
    Begin with larger or different weights for each unit, raise the learning rate (a saddle is left at the speed of
    learning rate times negative curvature), or wait: compare the loss with what guessing gives.

When it is wrong:
    With weights that are much too small in several layers at once all curvature of both signs is small, and what the
    biases of the output have outweighs it: such a plateau is not found. A loss that cannot fall any further may have
    small eigenvalues of both signs from noise alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._curvature import OF_STEP, at, before, of_step

RATIO = "spectral_density.negative_ratio"
MEASUREMENTS = 4


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Measurements that end a flat stretch with a large negative side."""
    steps = window[RATIO].steps
    ratio, has = at(window, RATIO, steps)
    loss, known = at(window, "sharpness.loss", steps)
    back = MEASUREMENTS - 1
    ratios = np.concatenate([before(ratio, back), ratio], axis=1)
    losses = np.concatenate([before(loss, back), loss], axis=1)
    lowest = ratios.min(axis=1, keepdims=True)  # NaN if one is, or if there are not enough
    has = has & known & ~np.isnan(lowest) & of_step(window, steps)
    span = steps[:, None] - before(steps[:, None].astype(np.float64), back)[:, :1]
    # of the middle of the stretch, whatever its sign; an infinite loss is not flat
    with np.errstate(invalid="ignore"):
        change = np.ptp(losses, axis=1, keepdims=True) / np.abs(np.median(losses, axis=1, keepdims=True))
        mask = has & (lowest >= p["ratio"]) & (span >= p["steps"]) & (change <= p["flat"])
    yield Hits(steps, ("",), mask, has, lowest, p["ratio"], {"loss": loss, "change": change})


RULE = Rule(
    id="indefinite_curvature",
    title="Flat loss at a saddle",
    severity="info",
    site="loss",
    message="The loss stays at {loss:.4g}, and the curvature is at least {value:.2g} times as negative as positive.",
    refute="the loss is at the lowest value that the data allow",
    remedies=(
        Remedy("larger initial weights, different for each unit"),
        Remedy("a larger learning rate, or patience, if the loss is that of guessing"),
    ),
    params=(
        Param(
            "ratio",
            0.5,
            "of the largest node",
            "calibrated on 26 small trainings: at the start 0.4 to 1.1, later at most 0.46 in healthy ones; on the "
            "plateau of one hidden layer with weights a thousandth of the usual size 1.0",
        ),
        Param("flat", 0.02, "fraction of the loss", "own choice"),
        Param("steps", 100, "steps", "own choice: the first steps of any training are flat and indefinite"),
    ),
    needs=(RATIO, "sharpness.loss", OF_STEP),
    check=check,
    lookback=100,  # the loss is measured several times as often
    release=3,
    doc=__doc__ or "",
)
