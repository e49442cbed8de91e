from __future__ import annotations

from collections.abc import Sequence
from math import inf, nan

from monitor.block import ColumnBlock
from tests.rules.series import Case, column

STEPS = [*range(100, 1100, 100)]


def book(
    negative: Sequence[float | None],
    earlier: float | Sequence[float | None] = 0.1,
    whole: float = 0.0,
    examples: float = 1000,
) -> tuple[ColumnBlock, ...]:
    n = len(negative)
    before = [earlier] * n if isinstance(earlier, float) else earlier
    visits = [2.0 + i for i in range(n)]
    columns = {"negative": negative, "earlier": before, "whole": [whole] * n, "visits": visits}
    columns["examples"] = [examples] * n
    return tuple(column(f"example_margin.{name}", values, ("",), STEPS[:n]) for name, values in columns.items())


CASES = (
    Case("a tenth that stays", book([0.1] * 10), (("", 100),)),
    Case("half the labels", book([0.5] * 10, 0.52), (("", 100),)),
    Case("from the seventh visit on", book([0.1] * 10, [nan] * 5 + [0.11] * 5), (("", 600),)),
    Case("near miss: 3.9 %", book([0.039] * 10, 0.04)),
    Case("near miss: more than half", book([0.51] * 10, 0.5)),
    Case("near miss: on its way down", book([0.4, 0.3, 0.22, 0.16, 0.12, 0.09], [0.6, 0.45, 0.32, 0.22, 0.17, 0.125])),
    Case("near miss: rare classes", book([0.1] * 10, whole=0.6)),
    Case("near miss: 99 examples", book([0.1] * 10, examples=99)),
    Case("once only", book([0.02, 0.1, 0.02, 0.02], 0.02)),
    Case("gaps", book([0.1, None] * 5), (("", 100),)),
    Case("constant", book([0.0] * 10, 0.0)),
    Case("non-finite", book([nan, inf, nan, inf])),
)
