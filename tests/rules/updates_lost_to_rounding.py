from __future__ import annotations

from collections.abc import Sequence
from math import nan

from monitor.block import ColumnBlock
from tests.rules.series import Case, Value, column

LOOKS = range(0, 610, 10)
NAMES = ("w", "gain")
FACTS = {
    "parameters": [{"name": "w", "optimizer": 0, "group": 0}, {"name": "gain", "optimizer": 0, "group": 1}],
    "optimizers": [{"groups": [{"weight_decay": 0.1, "decoupled_weight_decay": True}, {"weight_decay": 0.0}]}],
}


def looks(
    lost: tuple[Value, Value] = (0.9, 1.0),
    still: tuple[Value, Value] = (0.8, 1.0),
    asked: tuple[Value, Value] = (1.0, 1.0),
    rates: Sequence[Sequence[Value]] | None = None,
    end: int = 610,
) -> tuple[ColumnBlock, ...]:
    """A matrix of 10,000 elements and a gain of 100; what is still as it was is known at every hundredth step."""
    at = [s for s in LOOKS if s < end]
    hundreds = [s for s in at if s % 100 == 0 and s]
    return (
        column("lost_updates.frac", [lost] * len(at), NAMES, at),
        column("lost_updates.still", [still] * len(hundreds), NAMES, hundreds),
        column("lost_updates.asked", [asked] * len(at), NAMES, at),
        column("lost_updates.elements", [[10_000.0, 100.0]] * len(at), NAMES, at),
        column("learning_rate.lr", rates or [[1e-5, 1e-5]] * end, ("group[0]", "group[1]")),
    )


FOUND = (("", 100),)
# a tenth moves in each step: in a hundred steps 1 − exp(−100 / 10 / 3) = 96.4 % would have moved, three quarters of
# which are 72.3 %
CASES = (
    Case("nine in ten are lost, and four in five have not moved", looks(), FOUND, "warning", FACTS),
    Case("without facts", looks(), FOUND),
    Case("nothing moves", looks(lost=(1.0, 1.0), still=(1.0, 1.0)), FOUND),
    Case("just below what would have moved", looks(still=(0.29, 1.0)), FOUND),
    Case("near miss: just above, as of rounding at random", looks(still=(0.26, 1.0))),
    Case("near miss: rounding at random, hardly ever", looks(lost=(0.9992, 1.0), still=(0.97, 1.0))),
    Case("near miss: half are lost", looks(lost=(0.49, 1.0), still=(0.4, 1.0))),
    Case("near miss: only the gain rests", looks(lost=(0.2, 1.0), still=(0.02, 1.0))),
    Case("near miss: rows of an embedding", looks(asked=(0.49, 0.4))),
    Case("near miss: one look", looks(end=200)),
    Case(
        "near miss: the learning rate is 0, as where only another group trains",
        looks(lost=(1.0, 0.0), still=(1.0, 0.0), rates=[[0.0, 1e-5]] * 610),
        facts=FACTS,
    ),
    Case("near miss: it rises", looks(rates=[[1e-8 * s, 1e-8 * s] for s in range(610)])),
    Case("from when it has risen", looks(rates=[[1e-7 * min(s, 200)] * 2 for s in range(610)]), (("", 300),)),
    Case("gaps: a parameter without a gradient", looks(lost=(0.9, None), still=(0.8, None), asked=(1.0, None)), FOUND),
    Case("constant", looks(lost=(0.0, 0.0), still=(0.0, 0.0))),
    Case("non-finite", looks(lost=(nan, nan), still=(nan, nan), asked=(nan, nan))),
)
