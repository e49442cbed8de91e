from __future__ import annotations

from collections.abc import Sequence
from math import inf, nan, sin

from monitor.block import ColumnBlock
from tests.rules.series import Case, Value, column


def classified(loss: Sequence[Value]) -> tuple[ColumnBlock, ...]:
    return column("loss.value", loss), column("train_accuracy.accuracy", [0.9] * len(loss), ("cross_entropy",))


FALL = [0.1 + 2 * 0.95**t for t in range(200)]
# with the rise at point 200, point 209 is the tenth that is up: the median of 20 is then half-way
CASES = (
    Case(
        "from 0.1 to 2.5 at step 200: half-way is 1.3, more than a nat up",
        classified(FALL + [2.5] * 60),
        (("", 209),),
        "critical",
    ),
    Case("1e-8 to 5 for 30 steps", classified([1e-8] * 200 + [5.0] * 30 + [1e-8] * 99), (("", 209),)),
    Case("near miss: up by 0.9 nats", classified(FALL + [1.0] * 60)),
    Case("near miss: up by a nat from 3, which is not half of it", classified([3.0] * 200 + [4.1] * 60)),
    Case("near miss: nine bad points are no level", classified(FALL + [9.0] * 9 + [0.1] * 60)),
    Case("near miss: 1e-8 to 1e-4", classified([1e-8] * 200 + [1e-4] * 60)),
    Case(
        "no classes: from about 1 to 12, of which half-way is too little",
        (column("loss.value", [1 + 0.1 * sin(t) for t in range(200)] + [12.0] * 60),),
        (("", 210),),
    ),
    Case(
        "near miss: no classes, from 0.7 to 5, as a generator's loss may",
        (column("loss.value", [0.7] * 200 + [5.0] * 60),),
    ),
    Case(
        "near miss: a restart that takes the loss from 0.01 back to 0.4 for a while",
        classified([*FALL, *[0.01] * 99, *[0.4] * 40, *[0.01] * 99]),
    ),
    Case(
        "gaps: every second point missing, steps far apart",
        (
            column(
                "loss.value",
                [x if t % 2 else None for t, x in enumerate(FALL + [2.5] * 80)],
                steps=[9 * t for t in range(280)],
            ),
            column("train_accuracy.accuracy", [0.9] * 280, ("cross_entropy",), steps=[9 * t for t in range(280)]),
        ),
        (("", 9 * 219),),
    ),
    Case("constant", classified([0.0] * 500)),
    Case("constant: a margin that every batch keeps", (column("loss.value", [0.0] * 500),)),
    Case(
        "near miss: a margin that one batch in ten breaks",
        (column("loss.value", [0.0 if t % 10 else 0.1 + 0.001 * t for t in range(500)]),),
    ),
    Case("non-finite: not judged here, and no part of a level", classified([*FALL, *[nan, inf] * 60])),
    Case("exploding from the first step on", (column("loss.value", [1.3**t for t in range(80)]),), (("", 39),)),
)
