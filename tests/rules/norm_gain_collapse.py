from __future__ import annotations

from math import inf, nan

from tests.rules.series import Case, column

REF = "norm_layer.gain_median"
LAYERS = ("blocks.0.norm", "norm")

CASES = (
    Case(
        "falling by a fifth at every look",  # 0.8^11 = 0.086
        (column(REF, [[0.8**t, 1.0] for t in range(30)], LAYERS),),
        ((LAYERS[0], 11),),
    ),
    Case("near miss: 0.11", (column(REF, [1.0] * 20 + [0.11] * 20, LAYERS[:1]),)),
    Case("near miss: small, but not falling", (column(REF, [0.03] * 60, LAYERS[:1]),)),
    Case(
        "near miss: falling by 40 % in 40 looks",
        (column(REF, [0.09 * 0.6 ** (t / 40) for t in range(90)], LAYERS[:1]),),
    ),
    Case("near miss: two looks", (column(REF, [1.0] * 20 + [0.01] * 2 + [1.0] * 20, LAYERS[:1]),)),
    Case("near miss: growing from 0", (column(REF, [0.001 * t for t in range(60)], LAYERS[:1]),)),
    Case("gaps", (column(REF, [1.0, None] * 10 + [None, 0.05] * 5, LAYERS[:1]),), ((LAYERS[0], 21),)),
    Case("constant", (column(REF, [1.0] * 60, LAYERS[:1]),)),
    Case("non-finite", (column(REF, [1.0] * 5 + [nan] * 5 + [inf] * 5, LAYERS[:1]),)),
)
