"""The learning rate is above what the curvature allows, and the loss rises.

What it means:
    Step size times curvature exceeds what the optimizer's update rule is stable for. On a quadratic loss every step
    along the sharpest direction would be larger than the one before. A training that hovers at the edge (ratio near 1)
    or is thrown back below it is common and sound; one that stays above it while its loss rises is diverging.

How it is decided:
    The ratio of learning rate and (preconditioned) sharpness to the edge, `edge_of_stability`, is above 1.5 in 3
    measurements in a row, and the loss of each is above that of the one before. Judged only where every step trains on
    the same batch, and one process alone: the Hessian of a small batch is up to several times sharper than that of all
    the data. Nor where another loss than that of the step was given to be measured.

What to do:
    Lower the learning rate below the largest stable one that is shown, or warm it up; clip the gradient norm.

When it is wrong:
    Divergence may be over before three measurements have been made, and is then found by its loss. Clipping shortens
    steps, so that the true ratio is smaller. Small batches are not judged at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._curvature import CALIBRATION, OF_STEP, at, before, of_step, whole_data

RATIO = "edge_of_stability.ratio"


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Measurements above the edge whose loss is above that of the one before."""
    steps = window[RATIO].steps
    ratio, has = at(window, RATIO, steps)
    loss, known = at(window, "sharpness.loss", steps)
    has = has & known & whole_data(window, steps) & of_step(window, steps)
    rising = loss > before(loss, 1)
    evidence = {
        "loss": loss,
        "stable_lr": at(window, "edge_of_stability.stable_lr", steps)[0],
        "sharpness": at(window, "sharpness.value", steps)[0],
    }
    mask = has & (ratio > p["ratio"]) & rising & ~np.isnan(ratio)
    yield Hits(steps, ("",), mask, has, ratio, p["ratio"], evidence)


RULE = Rule(
    id="above_edge_of_stability",
    title="Learning rate above the edge of stability",
    severity="warning",
    site="loss",
    message="The step is {value:.3g} times as large as the curvature allows, and the loss rises.",
    refute="the loss falls again below where it began without a change of the learning rate",
    remedies=(
        Remedy("lower the learning rate, or reach it by a longer warm-up"),
        Remedy("clip the gradient norm"),
    ),
    params=(
        Param(
            "ratio",
            1.5,
            "of the edge",
            f"1 is the edge (arXiv 2103.00065); {CALIBRATION}: descent that came to the edge by itself overshot it to "
            "1.28 while its loss rose, and settled",
        ),
    ),
    needs=(
        RATIO,
        "edge_of_stability.stable_lr",
        "sharpness.loss",
        "sharpness.value",
        OF_STEP,
        "input_rms.fingerprint",
    ),
    check=check,
    lookback=10,
    hold=3,
    release=3,
    doc=__doc__ or "",
)
