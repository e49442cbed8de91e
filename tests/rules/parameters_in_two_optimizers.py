from __future__ import annotations

from collections.abc import Sequence
from math import nan

from monitor.block import ColumnBlock
from tests.rules.series import Case, Value, column

SECOND = ("optimizer[1]",)
STEPS = [*range(10), *range(29, 900, 29)]


def looks(twice: Sequence[Value], shared: Value = 4.0) -> tuple[ColumnBlock, ...]:
    """Whether the second optimizer used the first one's gradient at each look, and how many parameters both have."""
    at = STEPS[: len(twice)]
    return (
        column("optimizer_overlap.twice", twice, SECOND, at),
        column("optimizer_overlap.shared", [shared] * len(twice), SECOND, at),
    )


CASES = (
    Case("both at every step", looks([1.0] * 30), ((SECOND[0], 0),), "warning"),
    Case("from step 58 on", looks([0.0] * 11 + [1.0] * 9), ((SECOND[0], 58),)),
    Case("near miss: a backward of its own", looks([0.0] * 30)),
    Case("near miss: four looks", looks([0.0] * 5 + [1.0] * 4 + [0.0] * 20)),
    Case("gaps", looks([1.0, None] * 15), ((SECOND[0], 0),)),
    Case("constant: nothing in common", looks([None] * 30, None)),
    Case("non-finite", looks([nan] * 30, nan)),
)
