"""The training was thrown out of a valley that was too sharp for its learning rate, and landed in a flatter one.

What it means:
    The learning rate was above what the curvature allowed (at the start, or after it was raised). The loss rose, the
    sharpness fell, and training went on where the curvature fits the learning rate. A loss spike of this kind is the
    price of a large learning rate, not damage.

How it is decided:
    Of the last 10 measurements of `edge_of_stability`, one was above 1.3; the loss then rose to 1.3 times the loss at
    that measurement or more; now the ratio is below 1.2 and at most 0.8 of what it was, and the loss is not above
    what it was. Judged only where every step trains on the same batch, and one process alone, and not where another
    loss was given to be measured.

What to do:
    Nothing, if the spike is acceptable; else warm the learning rate up, or raise it in smaller steps.

When it is wrong:
    A learning rate that was lowered by hand after the spike looks the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._curvature import CALIBRATION, OF_STEP, at, before, of_step, whole_data

RATIO = "edge_of_stability.ratio"
PAPER = "the catapult mechanism of Lewkowycz et al. 2020 (arXiv 2003.02218)"


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Measurements back below the edge after one above it and a peak of the loss in between."""
    steps = window[RATIO].steps
    back = int(p["measurements"])
    ratio, has = at(window, RATIO, steps)
    loss, known = at(window, "sharpness.loss", steps)
    has = has & known & whole_data(window, steps) & of_step(window, steps)
    highest, earlier = np.full(ratio.shape, np.nan), before(ratio, back)
    peak = np.full(ratio.shape, np.nan)
    mask = np.zeros(ratio.shape, dtype=np.bool_)
    settled = has & (ratio <= p["below"])
    curve = window["loss.value"]
    for i in np.flatnonzero(settled[:, 0] & (earlier > p["ratio"]).any(axis=1)):
        j = i - back + int(np.nanargmax(earlier[i]))
        rows = slice(*np.searchsorted(curve.steps, (steps[j], steps[i])))
        between = curve["loss.value"][rows][curve.has("loss.value")[rows]]
        if not len(between):
            continue
        highest[i], peak[i] = ratio[j], np.nanmax(between)
        flatter = ratio[i, 0] <= p["flatter"] * ratio[j, 0]
        mask[i] = flatter and peak[i, 0] >= p["rise"] * loss[j, 0] and loss[i, 0] <= loss[j, 0]
    evidence = {"highest_ratio": highest, "peak_loss": peak, "loss": loss}
    yield Hits(steps, ("",), mask, has, ratio, p["below"], evidence)


RULE = Rule(
    id="catapult",
    title="Catapult",
    severity="info",
    site="loss",
    message="The ratio to the edge of stability was {highest_ratio:.3g}; the loss rose to {peak_loss:.4g} and came "
    "back, the ratio fell to {value:.3g}.",
    refute="the learning rate was lowered between the two measurements",
    remedies=(
        Remedy("nothing, if the spike is acceptable"),
        Remedy("warm the learning rate up, or raise it in smaller steps"),
    ),
    params=(
        Param("ratio", 1.3, "of the edge", f"{PAPER}; {CALIBRATION}"),
        Param("below", 1.2, "of the edge", CALIBRATION),
        Param("flatter", 0.8, "of the ratio before", CALIBRATION),
        Param("rise", 1.3, "of the loss before", CALIBRATION),
        Param("measurements", 10, "measurements", "own choice"),
    ),
    needs=(RATIO, "sharpness.loss", OF_STEP, "loss.value", "input_rms.fingerprint"),
    check=check,
    lookback=500,
    release=5,
    doc=__doc__ or "",
)
