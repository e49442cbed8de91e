from __future__ import annotations

from collections.abc import Sequence
from math import nan

from monitor.block import ColumnBlock
from tests.rules.dead_units import LAYERS, LOOKS
from tests.rules.dead_units import layers as with_units
from tests.rules.series import Case, Value, column


def layers(
    share: Sequence[Value] | Sequence[Sequence[Value]],
    units: Sequence[float] = (64, 64),
    rows: float = 64,
    role: Sequence[float] = (0, 0),
) -> tuple[ColumnBlock, ...]:
    """The share of saturated units of two layers (of one, if a look is one number), at every look."""
    names = LAYERS[: len(share[0])] if isinstance(share[0], Sequence) else LAYERS[:1]
    nothing = [[0.0] * len(names) for _ in share]
    return (column("saturation.share", share, names, LOOKS[: len(share)]), *with_units(nothing, units, rows, role))


CASES = (
    Case("from the start, the second of two layers", layers([[0.1, 0.86]] * 10), (("3", 0),), "warning"),
    Case("between the looks at 100 and 200", layers([0.2] * 6 + [0.95] * 5), (("1", 200),), "warning"),
    Case("near miss: two looks", layers([1.0, 1.0, 0.0] * 5)),
    Case("near miss: 74 %", layers([0.74] * 10)),
    Case("near miss: 4 units", layers([1.0] * 10, (4,))),
    Case("near miss: 15 rows", layers([1.0] * 10, rows=15)),
    Case("near miss: a classifier that is very sure", layers([1.0] * 10, role=(1,))),
    Case("near miss: the gate of a recurrent cell", layers([1.0] * 10, role=(2,))),
    Case("gaps", layers([1.0, None, None, 1.0, None, 1.0]), (("1", 0),)),
    Case("constant", layers([[0.0, 0.4]] * 20)),
    Case("non-finite: what is not known is not judged", layers([1.0, nan, 1.0, 1.0, nan]), (("1", 0),)),
)
