from __future__ import annotations

from collections.abc import Sequence
from math import inf, nan

from monitor.block import ColumnBlock
from tests.rules.series import Case, Value, column

EVERY = 10
ONE, OTHERS = [7.0] * 100, [float(i % 5) for i in range(100)]


def measured(
    ratio: Sequence[Value], loss: Sequence[Value], batch: Sequence[Value] = ONE
) -> tuple[ColumnBlock, ColumnBlock, ColumnBlock]:
    """Measurements every 10 steps, and the fingerprint of the batch at every step."""
    steps = range(0, EVERY * len(ratio), EVERY)
    return (
        column("edge_of_stability.ratio", ratio, steps=steps),
        column("sharpness.loss", loss, steps=steps),
        column("input_rms.fingerprint", batch, ("input[0]",)),
    )


RISING = [1.0 + 0.1 * i for i in range(10)]
FALLING = [2.0 - 0.1 * i for i in range(10)]

CASES = (
    # the measurement at step 0 has no earlier one, and only one fingerprint
    Case("above the edge and rising", measured([1.6] * 10, RISING), (("", 10),), "warning"),
    Case("above from the fifth measurement on", measured([1.0] * 5 + [1.7] * 5, RISING), (("", 50),)),
    Case("another batch every step: the ratio of one batch says nothing", measured([3.0] * 10, RISING, OTHERS)),
    Case(
        "one batch from step 40 on: ten steps of it are needed",
        measured([3.0] * 10, RISING, OTHERS[:40] + ONE[:60]),
        (("", 50),),
    ),
    Case(
        "several processes: one batch, which is a part of the data",
        measured([1.6] * 10, RISING),
        facts={"processes": 2},
    ),
    Case(
        "another loss was given to be measured, until step 40",
        (*measured([1.6] * 10, RISING), column("sharpness.of_step", [0] * 5 + [1] * 5, steps=range(0, 100, EVERY))),
        (("", 50),),
    ),
    Case("near miss: overshooting the edge, as on the way to it", measured([1.3] * 10, RISING)),
    Case("near miss: above it, and the loss falls", measured([1.6] * 10, FALLING)),
    Case("near miss: two measurements", measured([1.0] * 4 + [1.6] * 2 + [1.0] * 4, RISING)),
    Case("near miss: every second loss falls", measured([1.6] * 10, [1.0, 2.0] * 5)),
    Case("gaps", measured([1.0, None] * 3 + [1.6] * 4, RISING), (("", 60),)),
    Case("constant", measured([1.0] * 10, [1.0] * 10)),
    Case(
        "non-finite: an infinite ratio counts, NaN is no ratio",
        measured([1.0] * 3 + [nan] * 3 + [inf] * 4, RISING),
        (("", 60),),
    ),
)
