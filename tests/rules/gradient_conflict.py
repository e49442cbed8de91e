from __future__ import annotations

from collections.abc import Sequence
from math import inf, nan

from monitor.block import ColumnBlock
from tests.rules.series import Case, Value, column

PAIRS = ("code|prose", "code|tables")


def measured(cosine: Sequence[Value], other: Value = 0.2) -> tuple[ColumnBlock]:
    """Two pairs every 20 steps."""
    rows = [[c, other] for c in cosine]
    return (column("gradient_alignment.cosine", rows, PAIRS, range(0, 20 * len(rows), 20)),)


CASES = (
    Case("one pair of sources in conflict", measured([-0.6] * 15), (("code|prose", 180),), "info"),
    Case("from when six of ten are", measured([0.5] * 10 + [-0.6] * 10), (("code|prose", 300),)),
    Case("both pairs", measured([-0.6] * 12, -0.4), (("code|prose", 180), ("code|tables", 180))),
    Case("near miss: scatter around zero, as of sources that are fitted", measured([-0.5, 0.5, -0.2, 0.1] * 6)),
    Case("near miss: opposed by less", measured([-0.25] * 15)),
    Case("near miss: nine measurements", measured([-0.6] * 9)),
    Case("gaps", measured([-0.6] * 3 + [None] + [-0.6] * 11), (("code|prose", 260),)),
    Case("constant", measured([1.0] * 15)),
    Case("non-finite: NaN is no cosine", measured([-0.6] * 3 + [nan] + [-0.6] * 11), (("code|prose", 260),)),
    Case("non-finite: nor is infinity a conflict", measured([inf] * 15)),
)
