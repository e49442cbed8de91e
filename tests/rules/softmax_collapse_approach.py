from __future__ import annotations

from math import inf, nan

from tests.rules.series import Case, column

CE = ("cross_entropy",)
FALL = [10 - 0.1 * t for t in range(120)]  # below ln 64 = 4.1589 from step 59 on

CASES = (
    Case(
        "a headroom that falls by 0.1 a step", (column("sc_headroom.q50", FALL, CE),), (("cross_entropy", 59),), "info"
    ),
    Case("near miss: 4.16 nats", (column("sc_headroom.q50", [4.16] * 100, CE),)),
    Case("near miss: below for 19 points", (column("sc_headroom.q50", [9.0] * 9 + [4.0] * 19 + [9.0] * 9, CE),)),
    Case(
        "near miss: other rows still teach",
        (column("sc_headroom.q50", FALL, CE), column("train_accuracy.accuracy", [0.9] * 120, CE)),
    ),
    Case(
        "gaps",
        (column("sc_headroom.q50", [*([None, 4.0] * 20)], CE, steps=[7 * t for t in range(40)]),),
        (("cross_entropy", 7),),
    ),
    Case("constant", (column("sc_headroom.q50", [3.0] * 50, CE),), (("cross_entropy", 0),)),
    Case(
        "non-finite: −inf is no headroom at all, NaN is not judged",
        (column("sc_headroom.q50", [9.0] * 5 + [-inf, nan] * 20, CE),),
        (("cross_entropy", 5),),
    ),
)
