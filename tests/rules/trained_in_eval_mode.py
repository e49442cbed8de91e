from __future__ import annotations

from collections.abc import Sequence
from math import nan

from monitor.block import ColumnBlock
from tests.rules.series import Case, Value, column

STEPS = [*range(10), *range(20, 800, 20)]


def looks(left: Sequence[Value]) -> tuple[ColumnBlock, ...]:
    """Modules that are no longer in training mode at each look, of five."""
    at = STEPS[: len(left)]
    modules = [None if n is None else 5.0 for n in left]
    return column("training_mode.left", left, steps=at), column("training_mode.modules", modules, steps=at)


CASES = (
    Case("train() forgotten after step 40", looks([0.0] * 12 + [5.0] * 20), (("", 60),)),
    Case("called again at every epoch", looks([0.0] * 12 + [5.0] * 3 + [0.0] * 5 + [5.0] * 3), (("", 60), ("", 220))),
    Case("near miss: a single step", looks([0.0] * 12 + [5.0] + [0.0] * 9)),
    Case("near miss: none had been in training mode", looks([0.0] * 40)),
    Case("gaps", looks([0.0] * 11 + [5.0, None] * 9), (("", 40),)),
    Case("constant", looks([0.0] * 12)),
    Case("non-finite", looks([nan] * 12)),
)
