from __future__ import annotations

from math import nan

from monitor.block import ColumnBlock
from tests.rules.series import Case, Value, column

STEPS = range(0, 120, 10)
NAMES = ("w", "v")
UNIT = 2.0**-24


def looks(
    coarse: tuple[Value, Value] = (0.2, 0.2),
    zero: tuple[Value, Value] = (0.5, 0.5),
    least: Value = UNIT,
    seen: float = 1000,
    n: int = 12,
) -> tuple[ColumnBlock, ...]:
    """Two parameters of 3,000 and 7,000 elements, the same at every look."""
    at = STEPS[:n]
    return (
        column("gradient_zeros.zero", [zero] * n, NAMES, at),
        column("gradient_zeros.coarse", [coarse] * n, NAMES, at),
        column("gradient_zeros.least", [[least, least]] * n, NAMES, at),
        column("gradient_zeros.looked", [[seen, seen]] * n, NAMES, at),
        column("gradient_zeros.elements", [[3000.0, 7000.0]] * n, NAMES, at),
    )


def scale(value: float) -> ColumnBlock:
    return column("loss_scale.scale", [value] * 120)


def clip(value: float) -> ColumnBlock:
    return column("clip.coefficient", [value] * 120)


FOUND = (("", 0),)
CASES = (
    Case("one unit of float16", looks(), FOUND, "warning"),
    Case("one unit over the scale", (*looks(least=UNIT / 128), scale(128)), FOUND),
    Case("one unit, clipped to a tenth", (*looks(least=UNIT / 10), clip(0.1)), FOUND),
    Case("one parameter of 30 % of all elements", looks(coarse=(0.2, 0.01)), FOUND),
    Case("a small one beside which another is all 0", looks(coarse=(0.2, None), zero=(0.5, 1.0)), FOUND),
    Case("near miss: the smaller has no more than a tenth", looks(coarse=(0.0999, 0.0999))),
    Case("near miss: of few elements many are the smallest", looks(seen=79)),
    Case("near miss: the smallest is two units", looks(least=2 * UNIT)),
    Case("near miss: it is one unit before it was divided by the scale", (*looks(), scale(65536))),
    Case("near miss: four looks", looks(n=4)),
    Case("near miss: zeros of an embedding", looks(coarse=(0.01, 0.01), zero=(0.99, 0.99))),
    Case("near miss: all is 0", looks(coarse=(None, None), zero=(1.0, 1.0), least=None)),
    Case("gaps: no parameter of the second kind", looks(coarse=(0.2, None), zero=(0.5, None)), FOUND),
    Case("constant", looks(coarse=(0.001, 0.001))),
    Case("non-finite", looks(coarse=(nan, nan), zero=(nan, nan), least=nan)),
)
