"""One direction of the loss is more than ten times as sharp as the next.

What it means:
    The learning rate is limited by a single direction, and is ten or more times too small for every other one. Inputs
    that are not centred do this to the first layer (their mean is the direction), an output whose scale dwarfs the
    others' to the last.

How it is decided:
    The largest eigenvalue of the Hessian is above 10 times the second largest in 3 full measurements in a row, and both
    have converged. Only eigenvalues at the top can be told apart by a few products; the condition number proper, down
    to the smallest one, cannot be measured in a network and is not used.

What to do:
    Centre and scale the inputs (and targets), or normalise after the first layer; else an optimizer with a scale for
    each parameter.

When it is wrong:
    Adam and its kin have such scales; what counts for them is `preconditioned_sharpness`, of which only the largest
    eigenvalue is measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._series import exactly

VALUE, CONVERGED = "hessian_eigenvalue.value", "hessian_eigenvalue.converged"
FIRST = ("eigenvalue[1]", "eigenvalue[2]")


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Measurements whose largest eigenvalue stands alone."""
    steps = window[VALUE].steps
    values, has = exactly(window[VALUE], steps, FIRST)
    converged, known = exactly(window[CONVERGED], steps, FIRST)
    usable = has & known & (converged == 1) & ~np.isnan(values)
    largest, second = values[:, :1], values[:, 1:]
    has = usable.all(axis=1, keepdims=True) & (second > 0)
    ratio = np.divide(largest, second, out=np.full(largest.shape, np.nan), where=has)
    mask = has & (ratio > p["times"])
    yield Hits(steps, ("",), mask, has, ratio, p["times"], {"largest": largest, "second": second})


RULE = Rule(
    id="ill_conditioned",
    title="One direction is far sharper than all others",
    severity="info",
    site="loss",
    message="The largest eigenvalue of the Hessian is {largest:.4g}, {value:.3g} times the second: one direction "
    "limits the learning rate.",
    refute="centred and scaled inputs leave the ratio as it is",
    remedies=(
        Remedy("centre and scale the inputs and targets"),
        Remedy("normalise after the first layer, or use an optimizer with a scale for each parameter"),
    ),
    params=(
        Param(
            "times",
            10,
            "of the second eigenvalue",
            "calibrated on 26 small trainings: at most 4.3, medians 1.0 to 2.5; inputs that are not centred (LeCun et "
            "al. 1998, Efficient BackProp) give hundreds with one output",
        ),
    ),
    needs=(VALUE, CONVERGED),
    check=check,
    hold=3,
    release=3,
    doc=__doc__ or "",
)
