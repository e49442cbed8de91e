from __future__ import annotations

from math import inf, nan

from tests.rules.series import Case, column

HEADS = ("blocks.0.attn[0]", "blocks.0.attn[1]")
BOUND, FOUND = "attn_logit_max.lse_max", "attn_logit_max.found"
FIFTH, TENTH = range(0, 300, 5), range(0, 600, 10)

CASES = (
    # 10 · e^(0.02 · step): 100 at step 115.1, 1,000 at step 230.3, 10,000 at step 345.4 <= 2 · step from step 172.7 on
    Case("growing by 2 % a step", (column(BOUND, [10 * 1.0202013**t for t in FIFTH], HEADS[:1], FIFTH),),
         ((HEADS[0], 175),), "warning"),
    Case(
        "no bound: the largest logit of rows, every tenth step; 1 % a step, 10,000 at step 690.8",
        (column(FOUND, [10 * 1.0100502**t for t in TENTH], HEADS[:1], TENTH),),
        ((HEADS[0], 350),),
    ),
    Case(
        "of two heads the one that grows",
        (column(BOUND, [[150.0, 10 * 1.0202013**t] for t in FIFTH], HEADS, FIFTH),),
        ((HEADS[1], 175),),
    ),
    Case("near miss: sharp heads that stay so", (column(BOUND, [[400.0, 900.0]] * 60, HEADS, FIFTH),)),
    Case("near miss: slow growth", (column(BOUND, [100 * 1.001**t for t in FIFTH], HEADS[:1], FIFTH),)),
    Case("near miss: fast growth below 100", (column(BOUND, [min(99.0, 1.05**t) for t in FIFTH], HEADS[:1], FIFTH),)),
    Case("near miss: falling", (column(BOUND, [900 * 0.98**t for t in FIFTH], HEADS[:1], FIFTH),)),
    Case(
        "near miss: grown and settled",
        (column(BOUND, [min(10 * 1.0202013**t, 120.0) for t in FIFTH], HEADS[:1], FIFTH),),
    ),
    Case(
        "gaps: without all of the last twenty points nothing is said",
        (column(BOUND, [[5.0, None if t % 50 == 45 else 10 * 1.0202013**t] for t in FIFTH], HEADS, FIFTH),),
    ),
    Case("constant", (column(BOUND, [300.0] * 60, HEADS[:1], FIFTH),)),
    Case(
        "non-finite: neither NaN nor inf is on its way",
        (column(BOUND, [9.0] * 30 + [nan] * 10 + [inf] * 10 + [200.0] * 10, HEADS[:1], FIFTH),),
    ),
)  # fmt: skip
