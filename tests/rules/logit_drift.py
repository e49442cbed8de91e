from __future__ import annotations

from collections.abc import Sequence
from math import inf, log, nan

from monitor.block import ColumnBlock
from tests.rules.series import Case, column

MEAN, EXCESS, LEVEL = "log_z.mean", "log_z.excess", "logit_scale.mean"
CALL = ("cross_entropy",)
STEPS = range(0, 2500, 5)
LN = log(100)


def series(values: Sequence[float | None], steps: range = STEPS, shared: float = 1.0) -> tuple[ColumnBlock, ...]:
    """Log Z, and a mean logit that follows it by the given share."""
    excess = [None if v is None else v - LN for v in values]
    level = [None if v is None else shared * v for v in values]
    at = list(steps)[: len(values)]
    return (column(MEAN, values, CALL, at), column(EXCESS, excess, CALL, at), column(LEVEL, level, CALL, at))


FALLING = [4.6 - 0.04 * t for t in range(420)]  # below −5 after 240 points: 4.6 − 9.6 = −5.0

CASES = (
    Case("falling for ever", series(FALLING), (("cross_entropy", 1205),)),
    Case("rising for ever", series([0.1 * t for t in range(400)]), (("cross_entropy", 1235),)),  # 24.7 > 20 + ln 100
    Case("near miss: margins grow", series([0.1 * t for t in range(400)], shared=0.4)),
    Case("near miss: −4.9", series([max(v, -4.9) for v in FALLING])),
    Case("near miss: far out, but at rest", series([-9.0 + 0.01 * (t % 7) for t in range(400)])),
    Case("near miss: coming back", series([-30 + 0.05 * t for t in range(400)])),
    Case("near miss: 700 steps", series(FALLING, range(0, 1260, 3))),
    Case("gaps", series([v if t % 2 else None for t, v in enumerate(FALLING)]), (("cross_entropy", 1995),)),
    Case("constant", series([5.0] * 400)),
    Case("non-finite", series([5.0] * 300 + [nan] * 20 + [inf] * 20)),
)
