from __future__ import annotations

from collections.abc import Callable
from math import cos, inf, nan, pi

from monitor.block import ColumnBlock
from tests.rules.series import Case, Value, column


def rates(of: Callable[[int], Value], steps: int = 1000, first: int = 0) -> tuple[ColumnBlock, ...]:
    return (column("learning_rate.lr", [of(t) for t in range(steps)], ("group[0]",), range(first, first + steps)),)


CASES = (
    # below 1e-4 from the fourth drop on, at step 120; 200 steps at 319
    Case("divided by ten every 30 batches", rates(lambda t: 0.1**(1 + t // 30)), (("group[0]", 319),)),
    Case("linear to 0 at a quarter", rates(lambda t: max(0.0, 1 - t / 300)), (("group[0]", 599),)),
    Case("near miss: half of the steps", rates(lambda t: max(0.0, 1 - t / 300), 599)),
    Case("near miss: cosine", rates(lambda t: 1 + cos(pi * t / 1000))),
    Case("near miss: warm-up from 0", rates(lambda t: min(1.0, t / 500))),
    Case("near miss: a thousandth", rates(lambda t: 1.0 if t < 100 else 1e-3)),
    Case("near miss: always 0", rates(lambda t: 0.0)),
    Case("near miss: it is not known what came before", rates(lambda t: 0.1**(1 + t // 30), first=100)),
    Case("gaps", rates(lambda t: 0.1**(1 + t // 30) if t % 2 == 0 else None), (("group[0]", 318),)),
    Case("constant", rates(lambda t: 1e-3)),
    Case("non-finite", rates(lambda t: nan if t % 2 else inf)),
)  # fmt: skip
