from __future__ import annotations

from collections.abc import Sequence
from math import nan

from monitor.block import ColumnBlock
from tests.rules.series import Case, Value, column

STEPS = [*range(10), *range(11, 500, 11)]


def looks(updates: Sequence[Value], remembers: Value = 1.0) -> tuple[ColumnBlock, ...]:
    """Updates of the oldest optimizer at each look, and whether it keeps anything."""
    at = STEPS[: len(updates)]
    return (
        column("optimizer_age.updates", updates, steps=at),
        column("optimizer_age.remembers", [remembers] * len(updates), steps=at),
    )


CASES = (
    Case("made in the loop", looks([1.0] * 40), (("", 0),), "warning"),
    Case("from step 100 on", looks([*[s + 1.0 for s in STEPS[:19]], *[1.0] * 20]), (("", 110),)),
    Case("near miss: one for all", looks([s + 1.0 for s in STEPS])),
    Case("near miss: one for every ten updates", looks([s % 10 + 1.0 for s in STEPS])),
    Case("near miss: 14 looks", looks([1.0] * 14 + [2.0] * 20)),
    Case("near miss: nothing to remember", looks([1.0] * 40, 0.0)),
    Case("gaps", looks([1.0, None] * 20), (("", 0),)),
    Case("constant", looks([7.0] * 40)),
    Case("non-finite", looks([nan] * 40, nan)),
)
