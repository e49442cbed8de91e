from __future__ import annotations

from collections.abc import Sequence
from math import inf, nan

from monitor.block import ColumnBlock
from tests.rules.series import Case, Value, column

LOOKS = [0, 3, 10, 25, 50, *range(100, 2000, 100)]
LAYERS = ("1", "3")


def layers(
    dead: Sequence[Value] | Sequence[Sequence[Value]],
    units: Sequence[float] = (64, 64),
    rows: float = 64,
    role: Sequence[float] = (0, 0),
) -> tuple[ColumnBlock, ...]:
    """The share of dead units of two layers (of one, if a look is one number), at every look."""
    n = len(dead)
    names = LAYERS[: len(dead[0])] if isinstance(dead[0], Sequence) else LAYERS[:1]
    k = len(names)
    return (
        column("dormant_units.dead", dead, names, LOOKS[:n]),
        column("dormant_units.units", [list(units[:k])] * n, names, LOOKS[:n]),
        column("dormant_units.rows", [[rows] * k] * n, names, LOOKS[:n]),
        column("dormant_units.role", [list(role[:k])] * n, names, LOOKS[:n]),
    )


CASES = (
    Case("from the start, the second of two layers", layers([[0.5, 1.0]] * 10), (("3", 0),), "warning"),
    Case("between the looks at 100 and 200", layers([0.2] * 6 + [0.95] * 5), (("1", 200),), "warning"),
    Case("both, which go at different looks", layers([[0.0, 0.91]] * 5 + [[0.91, 1.0]] * 5), (("3", 0), ("1", 100))),
    Case("not at the first look yet, of a run with gaps before", layers([None, None, 1.0, 1.0, 1.0]), (("1", 10),)),
    Case("near miss: two looks", layers([1.0, 1.0, 0.0] * 5)),
    Case("near miss: 89 %", layers([0.89] * 10)),
    Case(
        "near miss: 94 % of 1,024 units, so that 61 are left, as of a sparse autoencoder", layers([0.94] * 10, (1024,))
    ),
    Case("near miss: 6 units", layers([1.0] * 10, (6,))),
    Case("near miss: one row", layers([1.0] * 10, rows=1)),
    Case("near miss: the model's output", layers([1.0] * 10, role=(1,))),
    Case("a gate that never opens", layers([1.0] * 10, role=(2,)), (("1", 0),)),
    Case("31 of 1,000 are left", layers([0.969] * 10, (1000,)), (("1", 0),)),
    Case("gaps", layers([1.0, None, None, 1.0, None, 1.0]), (("1", 0),)),
    Case("constant", layers([[0.0, 0.5]] * 20)),
    Case("non-finite: what is not known is not judged", layers([1.0, 1.0, nan, 1.0, inf]), (("1", 0),)),
)
