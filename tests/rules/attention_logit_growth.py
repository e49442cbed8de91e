from __future__ import annotations

from math import inf, nan

from tests.rules.series import Case, column

HEADS = ("blocks.0.attn[0]", "blocks.0.attn[1]")
BOUND, FOUND = "attn_logit_max.lse_max", "attn_logit_max.found"
GROWING = [10 * 1.1**t for t in range(60)]  # 1,000 is passed at step 49: 10 · 1.1^49 = 1067.2

CASES = (
    Case("growing by 10 % a step", (column(BOUND, GROWING, HEADS[:1]),), ((HEADS[0], 49),), "warning"),
    Case(
        "of two heads the one that is above 10,000",
        (column(BOUND, [[20.0, 2e4]] * 30, HEADS),),
        ((HEADS[1], 0),),
        "critical",
    ),
    Case(
        "no bound: the largest logit of the sampled rows, every tenth step",
        (column(FOUND, [1500.0] * 6, HEADS[:1], steps=range(0, 60, 10)),),
        ((HEADS[0], 0),),
        "warning",
    ),
    Case(
        "one head has a bound, the other only samples",
        (
            column(BOUND, [5.0] * 60, HEADS[:1]),
            column(FOUND, [[4.0, 1500.0]] * 6, HEADS, steps=range(0, 60, 10)),
        ),
        ((HEADS[1], 0),),
    ),
    Case("near miss: 999", (column(BOUND, [[999.0, 60.0]] * 60, HEADS),)),
    Case("near miss: two points", (column(BOUND, [9.0] * 20 + [2e3] * 2 + [9.0] * 30, HEADS[:1]),)),
    Case("near miss: logits of 500 in every head of a healthy model", (column(BOUND, [[400.0, 500.0]] * 100, HEADS),)),
    Case("gaps", (column(BOUND, [None, 2e3] * 20, HEADS[:1]),), ((HEADS[0], 1),)),
    Case("constant", (column(BOUND, [12.0] * 100, HEADS[:1]),)),
    Case(
        "non-finite: inf is too large, NaN is not judged",
        (column(BOUND, [9.0] * 5 + [nan] * 5 + [inf] * 5, HEADS[:1]),),
        ((HEADS[0], 10),),
        "critical",
    ),
)
