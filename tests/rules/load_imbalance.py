from __future__ import annotations

from collections.abc import Sequence
from math import inf, nan, sqrt

from monitor.block import ColumnBlock
from tests.rules.series import Case, Value, column

R = ("layers.0.router",)


def router(cv: Sequence[Value], tokens: float = 1024, experts: float = 8, k: float = 2) -> tuple[ColumnBlock, ...]:
    """A router recorded every fifth step; the busiest expert has a third."""
    at = [5 * t for t in range(len(cv))]
    others = {"experts": experts, "top_k": k, "tokens": tokens, "max_violation": experts / 3 - 1}
    return (
        column("router_balance.cv", cv, R, at),
        *(column(f"router_balance.{n}", [v] * len(cv), R, at) for n, v in others.items()),
    )


HALF = 0.5 * sqrt(8 / 2 - 1)  # half of the largest, 0.866

CASES = (
    Case("loads that vary by 0.9 from step 100 on", router([0.3] * 20 + [0.9] * 30), (("layers.0.router", 100),)),
    Case("near miss: 49 % of the largest", router([0.49 / 0.5 * HALF] * 60)),
    Case("near miss: 19 points", router([0.3] * 20 + [1.7] * 19 + [0.3] * 20)),
    Case("near miss: one dead expert of eight", router([sqrt(1 / 7)] * 60)),
    Case("near miss: 8 tokens, and half of the square is chance", router([sqrt(3 * 0.37)] * 60, tokens=8, experts=8)),
    Case("near miss: 3 assignments an expert", router([1.7] * 60, tokens=12)),
    Case("near miss: all experts for every token", router([0.9] * 60, k=8)),
    Case("gaps", router([0.3] * 20 + [None, 1.0] * 25), (("layers.0.router", 105),)),
    Case("constant, from the first step that is judged", router([1.7] * 40), (("layers.0.router", 50),)),
    Case("collapse of four experts", router([1.0] * 60, experts=4), (("layers.0.router", 50),)),
    Case("non-finite", router([nan, inf, nan] * 3 + [nan] * 40)),
)
