from __future__ import annotations

from math import inf, nan

from tests.rules.series import Case, column

REF = "residual_stream.rms"
STEPS = [*range(10), *range(50, 2550, 50)]
GROWING = [0.4 * 2.0 ** (0.5 * t) for t in range(60)]  # 300-fold from 17 on: 2^8.5 = 362; 0.4 · 2^8.5 = 145
BLOCKS = ("blocks.0", "blocks.1")

CASES = (
    Case("doubling every second look", (column(REF, GROWING[:26], BLOCKS[:1], STEPS[:26]),), ((BLOCKS[0], 400),)),
    Case(
        "the later of two blocks", (column(REF, [[1.0, 0.2]] * 20 + [[2.0, 150.0]] * 20, BLOCKS),), ((BLOCKS[1], 20),)
    ),
    Case("beyond 10,000", (column(REF, [1.0] * 20 + [2e4] * 5, BLOCKS[:1]),), ((BLOCKS[0], 20),), "critical"),
    Case("near miss: 299-fold", (column(REF, [1.0] * 20 + [299.0] * 20, BLOCKS[:1]),)),
    Case("near miss: large growth of something small", (column(REF, [0.01] * 20 + [99.0] * 20, BLOCKS[:1]),)),
    Case("near miss: one look", (column(REF, [1.0] * 20 + [999.0] + [1.0] * 20, BLOCKS[:1]),)),
    Case(
        "near miss: as slow as 200-fold in 40 looks", (column(REF, [200 ** (t / 40) for t in range(120)], BLOCKS[:1]),)
    ),
    Case("near miss: large from the start, as a pretrained model's", (column(REF, [700.0] * 60, BLOCKS[:1]),)),
    Case("gaps", (column(REF, [1.0, None] * 10 + [None, 400.0] * 5, BLOCKS[:1]),), ((BLOCKS[0], 21),)),
    Case("constant, zero and not", (column(REF, [[0.0, 3.0]] * 60, BLOCKS),)),
    Case(
        "non-finite: inf has grown, NaN is not judged",
        (column(REF, [1.0] * 5 + [nan] * 5 + [inf] * 5, BLOCKS[:1]),),
        ((BLOCKS[0], 10),),
        "critical",
    ),
)
