from __future__ import annotations

from math import nan

from monitor.block import ColumnBlock
from tests.rules.series import Case, column

STEPS = [*range(1, 11), *range(11, 200, 10)]


def looks(*values: float | None) -> tuple[ColumnBlock, ...]:
    return (column("autocast_cache.stale", list(values), steps=STEPS[: len(values)]),)


CASES = (
    Case("never left", looks(*[1.0] * 20), (("", 1),), "critical"),
    Case("from the 11th step on", looks(*[0.0] * 10, *[1.0] * 5), (("", 11),)),
    Case("near miss: twice", looks(1.0, 1.0, 0.0, 1.0, 1.0, 0.0)),
    Case("gaps", looks(1.0, None, 1.0, None, 1.0), (("", 1),)),
    Case("constant", looks(*[0.0] * 20)),
    Case("non-finite", looks(*[nan] * 20)),
)
