from __future__ import annotations

from collections.abc import Sequence
from math import nan

from monitor.block import ColumnBlock
from tests.rules.series import Case, Value, column

LOSS = ("binary_cross_entropy",)
STEPS = [*range(10), *range(20, 800, 20)]


def looks(values: Sequence[Value], low: Value = 0.1, high: Value = 0.8) -> tuple[ColumnBlock, ...]:
    """What autograd says at each look, and the range of the logits."""
    at = STEPS[: len(values)]
    ends = {"binary_logits.min": low, "binary_logits.max": high}
    return (
        column("binary_logits.squashed", values, LOSS, at),
        *(column(ref, [end] * len(values), LOSS, at) for ref, end in ends.items()),
    )


CASES = (
    Case("probabilities", looks([1.0] * 30), ((LOSS[0], 0),), "warning"),
    Case("from step 40 on", looks([0.0] * 12 + [1.0] * 10), ((LOSS[0], 60),)),
    Case("near miss: logits in the same range", looks([0.0] * 30)),
    Case("near miss: four looks", looks([1.0] * 4 + [0.0] * 20)),
    Case("near miss: autograd does not say", looks([None] * 30)),
    Case("gaps", looks([1.0, None, None] * 10), ((LOSS[0], 0),)),
    Case("constant: logits of 0", looks([0.0] * 30, 0.0, 0.0)),
    Case("non-finite", looks([nan] * 30, nan, nan)),
)
