from __future__ import annotations

from collections.abc import Callable
from math import inf, nan

from monitor.block import ColumnBlock
from tests.rules.series import Case, Value, column

HEADS = ("blocks.0.attn[0]", "blocks.0.attn[1]")
TENTH = range(0, 1000, 10)


def series(entropy: Callable[[int], list[Value]], loss: Callable[[int], Value]) -> tuple[ColumnBlock, ...]:
    return (
        column("attn_entropy.normalised", [entropy(t) for t in TENTH], HEADS, TENTH),
        column("loss.value", [loss(t) for t in range(1000)]),
    )


CASES = (
    # 400 losses are there from step 399 on
    Case("one of two heads is uniform from the start, the loss stands", series(lambda t: [0.999, 0.6], lambda t: 2.0),
         ((HEADS[0], 400),), "info"),
    # medians of 200 steps that fall by 0.5 % of 4 in 200: from 4.0 at step 300, where it stops at 1.5 -> both windows
    # hold 1.5 alone from step 699 on, but two medians agree as soon as half of the older window does: step 599
    Case(
        "the loss falls, then stands",
        series(lambda t: [0.999, 0.6], lambda t: max(4 - t / 120, 1.5)),
        ((HEADS[0], 600),),
    ),
    Case("a head that dies at step 600", series(lambda t: [0.5, 0.5 if t < 600 else 1.0], lambda t: 2.0),
         ((HEADS[1], 600),)),
    Case("near miss: uniform, but the loss still falls by 2.5 % in 200 steps",
         series(lambda t: [0.999, 0.999], lambda t: 2 * 0.975 ** (t / 200))),
    Case("near miss: 98.9 % of the entropy", series(lambda t: [0.989, 0.985], lambda t: 2.0)),
    Case("near miss: 19 points", series(lambda t: [1.0 if 500 <= t < 690 else 0.5, 0.5], lambda t: 2.0)),
    Case("near miss: sharp heads", series(lambda t: [0.0, 0.01], lambda t: 2.0)),
    Case("near miss: 399 losses", tuple(c for c in (
        column("attn_entropy.normalised", [[1.0, 1.0]] * 40, HEADS, TENTH[:40]), column("loss.value", [2.0] * 399)))),
    Case("gaps: the head is missing at every other point, the loss now and then",
         series(lambda t: [None if t % 20 else 1.0, 0.5], lambda t: None if t % 3 else 2.0), ()),
    Case("gaps: the head is missing at every other point",
         series(lambda t: [None if t % 20 else 1.0, 0.5], lambda t: 2.0),
         ((HEADS[0], 400),)),
    Case("constant", series(lambda t: [0.7, 0.3], lambda t: 2.0)),
    Case("non-finite: NaN is not judged, and a loss that is no number does not stand",
         series(lambda t: [nan, 1.0], lambda t: nan if t % 2 else inf)),
)  # fmt: skip
