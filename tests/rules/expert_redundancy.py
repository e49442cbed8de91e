from __future__ import annotations

from collections.abc import Sequence
from math import inf, nan

from monitor.block import ColumnBlock
from tests.rules.series import Case, Value, column

R = ("mlp.gate",)


def experts(largest: Sequence[Value]) -> tuple[ColumnBlock, ...]:
    """Experts looked at every hundredth step."""
    at = [100 * t for t in range(len(largest))]
    return (
        column("expert_similarity.largest", largest, R, at),
        column("expert_similarity.mean", [0.1] * len(at), R, at),
    )


CASES = (
    Case("0.95 from step 700 on", experts([0.05] * 7 + [0.95] * 5), (("mlp.gate", 700),)),
    Case("near miss: two looks", experts([0.05] * 7 + [0.95] * 2 + [0.05] * 5)),
    Case("near miss: 0.89", experts([0.89] * 20)),
    Case("near miss: copies that are apart after 500 steps", experts([1.0] * 5 + [0.5] * 10)),
    Case("gaps", experts([0.05] * 7 + [None, 0.99] * 5), (("mlp.gate", 800),)),
    Case("constant, from the first step that is judged", experts([1.0] * 12), (("mlp.gate", 500),)),
    Case("non-finite", experts([nan, -inf, nan] * 6)),
)
