from __future__ import annotations

from collections.abc import Sequence
from math import nan

from monitor.block import ColumnBlock
from tests.rules.series import Case, Value, column


def begins(counted: Sequence[Value], first: int = 500, modules: tuple[str, ...] = ("",)) -> tuple[ColumnBlock, ...]:
    """The first steps of an attempt from step ``first`` on; the same of every optimizer."""
    steps = range(first, first + len(counted))
    since: list[list[Value]] = [[i + 1.0] * len(modules) for i in range(len(counted))]
    return (
        column("optimizer_resumed.counted", [[c] * len(modules) for c in counted], modules, steps),
        column("optimizer_resumed.since", since, modules, steps),
    )


ANEW: list[Value] = [i + 1.0 for i in range(10)]
CASES = (
    Case("begins anew", begins(ANEW), (("", 500),), "warning"),
    Case("two of them", begins(ANEW, modules=("", "optimizer[1]")), (("", 500), ("optimizer[1]", 500))),
    Case("near miss: goes on", begins([501.0 + i for i in range(10)])),
    Case("near miss: goes on from an earlier checkpoint", begins([2.0 + i for i in range(10)])),
    Case("near miss: two steps", begins(ANEW[:2])),
    Case("near miss: nothing to remember", begins(ANEW, first=0)),
    Case("gaps", begins([1.0, None, 3.0, None, 5.0]), (("", 500),)),
    Case("constant", begins([7.0] * 6)),
    Case("non-finite", begins([nan] * 10)),
)
