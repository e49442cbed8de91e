from __future__ import annotations

from collections.abc import Mapping
from math import nan

from monitor.block import ColumnBlock
from tests.rules.series import Case, Value, column


def scaler(skipped: Mapping[int, Value], n: int = 1200, scale: Value = 65536.0) -> tuple[ColumnBlock, ...]:
    """Updates skipped before those of ``skipped``, none before the others; the scale stays where it is."""
    return (
        column("loss_scale.scale", [scale] * n),
        column("loss_scale.skipped", [skipped.get(i, 0.0) for i in range(n)]),
    )


def every(distance: int, first: int = 0, end: int = 1200) -> dict[int, Value]:
    return dict.fromkeys(range(first, end, distance), 1.0)


CASES = (
    Case("one in 50", scaler(every(50, 7)), (("", 457),), "warning"),
    Case("from step 600 on", scaler(every(20, 600)), (("", 780),)),
    Case("three in a hundred at a low scale", scaler(every(30, 200), scale=64.0), (("", 260),)),
    Case("no more updates at all", scaler({0: 3.0, 900: 166.0}, 901, 0.0), (("", 900),), "critical"),
    Case("near miss: one in 51, nine of 500", scaler(every(56, 7))),
    Case("near miss: the first search", scaler({0: 9.0, 1: 2.0, 3: 1.0, 4: 1.0}, scale=64.0 * 4)),
    Case("near miss: the first search goes down to 8", scaler({0: 13.0}, scale=8.0)),
    Case("near miss: twice in a hundred at a low scale", scaler(every(51, 200), 300, scale=64.0)),
    Case("near miss: 25 in a row from 2^30", scaler({0: 25.0}, scale=32.0)),
    Case("gaps", scaler(dict.fromkeys(range(0, 1200, 3)) | every(51, 1)), (("", 460),)),
    Case("constant", scaler({})),
    Case("non-finite", scaler(dict.fromkeys(range(1200), nan), scale=nan)),
)
