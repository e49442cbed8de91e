from __future__ import annotations

from collections.abc import Sequence
from math import inf, nan

from monitor.block import ColumnBlock
from tests.rules.series import Case, Value, column

EVERY = 40


def measured(
    ratio: Sequence[Value],
    rows: float = 1000,
    up: float = 8,
    down: float = 9,
    pull: Sequence[Value] | float = 60.0,
    cancelled: float = 0.99,
    every: int = EVERY,
) -> tuple[ColumnBlock, ...]:
    """Full measurements every 40 steps, the edge of stability every ``every``; a typical row pulls with 1."""
    n = len(ratio) * every // EVERY
    pulls = list(pull) if isinstance(pull, Sequence) else [pull] * n
    at = range(0, EVERY * n, EVERY)
    constant = {"rows": rows, "up": up, "down": down, "typical": 1.0, "cancelled": cancelled}
    columns = [column(f"opposing_signals.{name}", [value] * n, steps=at) for name, value in constant.items()]
    columns.append(column("opposing_signals.up_mean", pulls, steps=at))
    columns.append(column("opposing_signals.down_mean", [None if v is None else -v for v in pulls], steps=at))
    columns.append(column("edge_of_stability.ratio", ratio, steps=range(0, every * len(ratio), every)))
    return tuple(columns)


EDGE = [1.02] * 8

CASES = (
    Case("two groups of less than a hundredth at the edge", measured(EDGE), (("", 0),), "info"),
    Case("from when the edge is reached", measured([0.5, 0.7, 0.85, *EDGE]), (("", 120),)),
    Case("the ratio is measured oftener", measured([1.02] * 40, every=8), (("", 0),)),
    Case("near miss: far from the edge few rows are left to fit", measured([0.67] * 8)),
    Case("near miss: a twentieth of the rows", measured(EDGE, up=50, down=50)),
    Case("near miss: one group is large, so its rows pull as all do", measured(EDGE, down=300)),
    Case("near miss: two of fifty rows", measured(EDGE, rows=50, up=1, down=1)),
    Case("near miss: they do not cancel, the loss falls along it", measured(EDGE, cancelled=0.4)),
    Case("near miss: two measurements", measured([0.5] * 3 + [1.02] * 2 + [0.5] * 3)),
    Case("gaps", measured([0.5, None, 0.5, None, *EDGE]), (("", 160),)),
    Case("constant", measured([0.5] * 8, up=100, down=100, pull=2.0)),
    Case(
        "non-finite: an infinite pull counts, NaN is none",
        measured([1.02] * 9, pull=[5.0] * 3 + [nan] * 3 + [inf] * 3),
        (("", 240),),
    ),
)
