from __future__ import annotations

from collections.abc import Sequence
from math import inf, nan

from monitor.block import ColumnBlock
from tests.rules.series import Case, Value, column

MODULES = tuple(f"eigenvalue[{i}]" for i in range(1, 6))


def measured(
    ratio: Sequence[Value], converged: Sequence[float] = (1, 1, 0, 0, 0), second: float = 2.0
) -> tuple[ColumnBlock, ColumnBlock]:
    """The five largest eigenvalues every 40 steps, the first ``ratio`` times the second."""
    steps = range(0, 40 * len(ratio), 40)
    values = [[None if r is None else r * second, second, 1.5, 1.2, 1.0] for r in ratio]
    return (
        column("hessian_eigenvalue.value", values, MODULES, steps),
        column("hessian_eigenvalue.converged", [list(converged)] * len(ratio), MODULES, steps),
    )


CASES = (
    Case("one eigenvalue stands alone", measured([40.0] * 5), (("", 0),), "info"),
    Case("from the third measurement on", measured([2.0] * 2 + [11.0] * 4), (("", 80),)),
    Case("near miss: eight times", measured([8.0] * 6)),
    Case("near miss: two measurements", measured([2.0] * 3 + [40.0] * 2 + [2.0] * 3)),
    Case("near miss: the second has not converged", measured([40.0] * 6, converged=(1, 0, 0, 0, 0))),
    Case("near miss: the second is not positive, so there is no ratio", measured([-40.0] * 6, second=-2.0)),
    Case("gaps", measured([2.0, None, None, 40.0, 40.0, 40.0]), (("", 120),)),
    Case("constant", measured([1.0] * 6)),
    Case("non-finite: infinity stands alone, NaN is nothing", measured([nan] * 3 + [inf] * 3), (("", 120),)),
)
