from __future__ import annotations

from math import inf, nan

from tests.rules.series import Case, column

REF = "embedding_rows.frac"
STEPS = [*range(10), *range(100, 5100, 100)]
TABLE = ("tokens.weight",)

CASES = (
    # the look ten before step 1,000 is the one of step 9, and that of 1,300 the one of 300
    Case("a third for ever", (column(REF, [0.35] * 40, TABLE, STEPS[:40]),), ((TABLE[0], 1000),)),
    Case(
        "falling at first",
        (column(REF, [1 - 0.1 * min(t, 6) for t in range(40)], TABLE, STEPS[:40]),),
        ((TABLE[0], 1000),),
    ),
    Case("near miss: 9 %", (column(REF, [0.09] * 40, TABLE, STEPS[:40]),)),
    Case("near miss: new rows all the time", (column(REF, [0.9 - 0.0011 * t for t in range(40)], TABLE, STEPS[:40]),)),
    Case("near miss: a short training", (column(REF, [0.35] * 18, TABLE, STEPS[:18]),)),
    Case("gaps", (column(REF, [0.35, None] * 20, TABLE, range(0, 4000, 100)),), ((TABLE[0], 2000),)),
    Case("constant", (column(REF, [0.0] * 40, TABLE, STEPS[:40]),)),
    Case("non-finite", (column(REF, [nan] * 30 + [inf] * 5, TABLE, STEPS[:35]),)),
)
