from __future__ import annotations

from collections.abc import Sequence
from math import inf, nan

from monitor.block import ColumnBlock
from tests.rules.series import Case, Value, column

R = ("mlp.gate",)


def router(churn: Sequence[Value], lr: Sequence[float]) -> tuple[ColumnBlock, ...]:
    """A router looked at every fiftieth step."""
    at = [50 * t for t in range(1, len(churn) + 1)]
    return (
        column("pathway_churn.churn", churn, R, at),
        column("pathway_churn.lr_part", lr, R, at),
        column("pathway_churn.steps", [50.0] * len(at), R, at),
    )


DECAY = [1.0] * 10 + [0.1] * 10

CASES = (
    Case("as much as ever after the decay", router([0.3] * 20, DECAY), (("mlp.gate", 550),)),
    Case("near miss: at a constant learning rate", router([0.3] * 20, [1.0] * 20)),
    Case("near miss: less after the decay", router([0.5] * 10 + [0.14] * 10, DECAY)),
    Case("near miss: two looks", router([0.1] * 10 + [0.3] * 2 + [0.1] * 8, DECAY)),
    Case("gaps", router([0.3] * 10 + [None, 0.3] * 5, DECAY), (("mlp.gate", 600),)),
    Case("constant", router([0.1] * 20, DECAY)),
    Case("non-finite", router([nan, -inf] * 10, DECAY)),
)
