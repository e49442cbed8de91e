from __future__ import annotations

from collections.abc import Callable
from math import cos, inf, nan, pi

from monitor.block import ColumnBlock
from tests.rules.series import Case, Value, column


def rates(of: Callable[[int], Value], steps: int = 1500) -> tuple[ColumnBlock, ...]:
    return (column("learning_rate.lr", [of(t) for t in range(steps)], ("group[0]",)),)


def cosine(t: int, length: int) -> float:
    return 1 + cos(pi * t / length)


CASES = (
    # maxima at 20, 40, …: the fifth is known one step later
    Case("half a cosine of ten steps, stepped on", rates(lambda t: cosine(t, 10)), (("group[0]", 101),)),
    Case("of a hundred steps", rates(lambda t: cosine(t, 100)), (("group[0]", 1001),)),
    Case("near miss: of 126 steps", rates(lambda t: cosine(t, 126))),
    Case("near miss: restarts", rates(lambda t: cosine(t % 20, 20))),
    Case("near miss: not far down", rates(lambda t: 0.15 + cosine(t, 10))),
    Case("near miss: once", rates(lambda t: min(1.0, t / 100) * cosine(t, 1500))),
    Case("gaps", rates(lambda t: cosine(t, 10) if t % 300 < 290 else None), (("group[0]", 101),)),
    Case("constant", rates(lambda t: 1e-3)),
    Case("non-finite", rates(lambda t: nan if t % 2 else inf)),
)
