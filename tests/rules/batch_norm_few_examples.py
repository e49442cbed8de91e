from __future__ import annotations

from collections.abc import Sequence
from math import nan

from monitor.block import ColumnBlock
from tests.rules.series import Case, Value, column

STEPS = [*range(10), *range(20, 800, 20)]


def looks(examples: Sequence[Value]) -> tuple[ColumnBlock, ...]:
    """Examples normalised together at each look, of 64 pixels each."""
    at = STEPS[: len(examples)]
    samples = [None if n is None else 64 * n for n in examples]
    return column("batch_norm.examples", examples, steps=at), column("batch_norm.samples", samples, steps=at)


CASES = (
    Case("two", looks([2.0] * 30), (("", 0),), "info"),
    Case("seven, from step 20 on", looks([32.0] * 10 + [7.0] * 20), (("", 20),)),
    Case("near miss: eight", looks([8.0] * 30)),
    Case("near miss: a last batch now and then", looks([32.0, 32.0, 32.0, 3.0] * 7)),
    Case("gaps", looks([4.0, None] * 15), (("", 0),)),
    Case("constant", looks([64.0] * 30)),
    Case("non-finite", looks([nan] * 30)),
)
