from __future__ import annotations

from collections.abc import Sequence
from math import inf, nan

from monitor.block import ColumnBlock
from tests.rules.series import Case, Value, column

LOOKS = [*range(1, 11), *range(31, 3100, 31)]


def looks(
    shares: Sequence[Value], backwards: Sequence[Value] | None = None, module: str = ""
) -> tuple[ColumnBlock, ...]:
    """Shares of one optimizer at the steps it is looked at, and the calls of backward before each, by default one."""
    at = LOOKS[: len(shares)]
    return (
        column("gradient_reuse.share", shares, (module,), at),
        column("gradient_reuse.backwards", backwards or [1.0] * len(shares), (module,), at),
    )


CASES = (
    Case("nobody zeroes", looks([0.5, 0.8, 0.7, 1.2, 0.9] * 5), (("", 1),), "warning"),
    Case(
        "a second optimizer, with accumulation",
        looks([0.9] * 20, [4.0] * 20, "optimizer[1]"),
        (("optimizer[1]", 1),),
    ),
    Case("zeroed for 10 looks, then never again", looks([0.0] * 10 + [0.9] * 20), (("", 31),)),
    Case("near miss: zeroed", looks([0.0] * 30)),
    Case("near miss: four looks", looks([0.9] * 4 + [0.0] * 20)),
    Case("near miss: zeroed now and then", looks([0.9, 0.9, 0.9, 0.9, 0.0] * 6)),
    Case("near miss: hardly anything is left", looks([1.5e-5] * 30)),
    Case("near miss: updates without a backward", looks([1.0] * 30, [0.0] * 30)),
    Case("gaps", looks([0.9, None, 0.8, None, 0.7] * 4, [1.0, None] * 10), (("", 1),)),
    Case("constant", looks([0.3] * 30), (("", 1),)),
    Case("non-finite", looks([nan] * 30)),
    Case("non-finite: a gradient that overflows", looks([0.9] * 6 + [nan] * 4 + [0.0] * 9 + [nan, -inf]), (("", 1),)),
)
