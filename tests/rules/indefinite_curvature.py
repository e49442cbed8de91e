from __future__ import annotations

from collections.abc import Sequence
from math import inf, nan

from monitor.block import ColumnBlock
from tests.rules.series import Case, Value, column


def measured(ratio: Sequence[Value], loss: Sequence[Value], every: int = 40) -> tuple[ColumnBlock, ColumnBlock]:
    """Full measurements every 40 steps; the loss is also known half-way between two."""
    half = [x for value in loss for x in (value, 0.5)]
    return (
        column("spectral_density.negative_ratio", ratio, steps=range(0, every * len(ratio), every)),
        column("sharpness.loss", half, steps=range(0, every * len(ratio), every // 2)),
    )


FLAT = [2.303, 2.302, 2.302, 2.301, 2.302, 2.3, 2.301, 2.3]
FALLING = [2.3 * 0.97**i for i in range(8)]

CASES = (
    Case("a plateau that curves both ways", measured([0.9] * 8, FLAT), (("", 120),), "info"),
    Case("from the fourth measurement on that is indefinite", measured([0.1] * 2 + [0.9] * 6, FLAT), (("", 200),)),
    Case("four measurements within 100 steps are not enough", measured([0.9] * 8, FLAT, 10)),
    Case(
        "another loss was given to be measured",
        (*measured([0.9] * 8, FLAT), column("sharpness.of_step", [0.0] * 8, steps=range(0, 320, 40))),
    ),
    Case("near miss: the loss falls by 3 % each time", measured([0.9] * 8, FALLING)),
    Case("near miss: mostly positive", measured([0.4] * 8, FLAT)),
    Case("near miss: every fourth is positive", measured([0.9, 0.9, 0.9, 0.1] * 2, FLAT)),
    Case("gaps", measured([0.9, 0.9, None, 0.9, 0.9, 0.9, 0.9, 0.9], FLAT), (("", 160),)),
    Case("constant", measured([0.0] * 8, [1.0] * 8)),
    Case(
        "non-finite: an infinite ratio counts, NaN is none, an infinite loss is not flat",
        (*measured([nan, nan, inf, inf, inf, inf, inf, inf], [2.3] * 6 + [inf, inf]),),
        (("", 200),),
    ),
)
