"""The softmax is coming close to collapse.

What it means:
    In the median training row, the mass of all wrong classes together is within a factor of 64 of the unit roundoff
    of the loss. If the logits go on growing, losses become exactly zero and learning stops (see softmax_collapse).

How it is decided:
    Headroom is ln(mass of the other classes / unit roundoff), in nats; its median over the rows is below ln 64 = 4.16
    for 20 points, and what all rows still teach, (1 − accuracy) + (1 − mean largest probability), is at most 2^-12.
    The time that is left is the headroom divided by its fall per step over the last 50 points.

What to do:
    Decide whether training still has a purpose. If it has, do now what softmax_collapse recommends.

When it is wrong:
    A confident classifier of easy data is close to collapse without being in danger. That is why this is information
    and no warning. A loss computed in bfloat16 or float16 begins within 5.5 or 7.6 nats of collapse.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from monitor.metric import Array
from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._series import teaching


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Median headroom below the limit."""
    ref = "sc_headroom.q50"
    block = window[ref]
    start = int(np.searchsorted(block.steps, window.first))
    headroom, has = block[ref], block.has(ref) & ~np.isnan(block[ref])
    broken = (has & (headroom < p["headroom"]))[start:]
    if broken.any():
        signal = teaching(window, block.steps[start:], block.modules)
        broken &= signal <= p["signal"]
    left = np.full(broken.shape, np.nan)
    for row, i in np.argwhere(broken):
        rows = slice(max(start + row + 1 - int(p["window"]), 0), start + row + 1)
        points = has[rows, i] & np.isfinite(headroom[rows, i])
        fall = -_slope(block.steps[rows][points], headroom[rows, i][points])
        now = headroom[start + row, i]
        if fall > 0 and now > 0:
            left[row, i] = now / fall
    yield Hits(
        block.steps[start:], block.modules, broken, has[start:], headroom[start:], p["headroom"], {"steps_left": left}
    )


def _slope(steps: npt.NDArray[np.int64], values: Array) -> float:
    """Least-squares slope per step; NaN for fewer than two points."""
    if len(steps) < 2:
        return np.nan
    t = steps - steps.mean()
    return float((t * (values - values.mean())).sum() / (t * t).sum())


RULE = Rule(
    id="softmax_collapse_approach",
    title="Softmax close to collapse",
    severity="info",
    site="logits",
    message="The median training row is {value:.3g} nats away from a loss of exactly zero.",
    refute="the headroom stays where it is, or rises again",
    remedies=(
        Remedy("decide whether training still has a purpose; if not, stop"),
        Remedy("train with StableMax instead of softmax", "monitor.remedies.StableMaxCrossEntropy"),
        Remedy("take the part of the gradient along the weights away", "monitor.remedies.OrthogonalGradient"),
    ),
    params=(
        Param("headroom", float(np.log(64)), "nats", "own choice: a factor of 64 from the unit roundoff"),
        Param(
            "signal", 2.0**-12, "fraction", "4,096 roundings of float32; healthy trainings with zero losses stay above"
        ),
        Param("window", 50, "points", "own choice: over which the slope is taken"),
    ),
    needs=("sc_headroom.q50", "train_accuracy.accuracy", "train_accuracy.top1_mass"),
    check=check,
    lookback=50,
    hold=20,
    doc=__doc__ or "",
)
