from __future__ import annotations

from collections.abc import Sequence
from math import nan

from monitor.block import ColumnBlock
from tests.rules.series import Case, Value, column


def evaluations(losses: Sequence[Value], steps: Sequence[int], evaluated: float = 0.0) -> tuple[ColumnBlock, ...]:
    """Losses of each evaluation, in a model of two dropouts and three normalisations."""
    beside = {"losses": losses, "dropouts": [2.0] * len(losses), "norms": [3.0] * len(losses)}
    beside["evaluated"] = [evaluated] * len(losses)
    return tuple(
        column(f"evaluation_mode.{name}", [None if n is None else v for n, v in zip(losses, values, strict=True)],
               steps=steps)
        for name, values in beside.items()
    )  # fmt: skip


CASES = (
    Case("at every epoch", evaluations([7.0] * 5, range(100, 600, 100)), (("", 100),)),
    Case("at every other step", evaluations([1.0] * 5, range(1, 11, 2)), (("", 1),)),
    Case("near miss: before every step", evaluations([1.0] * 50, range(1, 51))),
    Case("near miss: once", evaluations([7.0], [100])),
    Case("near miss: the same in evaluation mode beside it", evaluations([7.0] * 5, range(100, 600, 100), 7.0)),
    Case("gaps", evaluations([7.0, None, 7.0, None], range(100, 500, 100)), (("", 100),)),
    Case("constant", evaluations([0.0] * 5, range(100, 600, 100))),
    Case("non-finite", evaluations([nan] * 5, range(100, 600, 100))),
)
