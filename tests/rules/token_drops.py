from __future__ import annotations

from collections.abc import Sequence
from math import inf, nan

from monitor.block import ColumnBlock
from tests.rules.series import Case, Value, column

R = ("mlp.router.classifier",)


def router(dropped: Sequence[Value], tokens: float = 1024, experts: float = 8, k: float = 1) -> tuple[ColumnBlock, ...]:
    """A router recorded every fifth step; the busiest expert is asked for a quarter."""
    at = [5 * t for t in range(len(dropped))]
    others = {"experts": experts, "top_k": k, "tokens": tokens, "max_violation": experts / 4 - 1}
    return (
        column("router_balance.dropped", dropped, R, at),
        *(column(f"router_balance.{n}", [v] * len(dropped), R, at) for n, v in others.items()),
    )


CASES = (
    Case("a tenth from step 100 on", router([0.01] * 20 + [0.1] * 30), ((R[0], 100),)),
    Case("near miss: 4.9 %", router([0.049] * 60)),
    Case("near miss: 19 points", router([0.01] * 20 + [0.3] * 19 + [0.01] * 20)),
    Case("near miss: 15 assignments an expert", router([0.2] * 60, tokens=120)),
    Case("near miss: no limit, whatever one would drop", router([None] * 60)),
    Case("gaps", router([0.01] * 20 + [None, 0.2] * 25), ((R[0], 105),)),
    Case("constant, from the first step that is judged", router([0.06] * 40), ((R[0], 50),)),
    Case("non-finite", router([nan, inf, nan] * 3 + [nan] * 40)),
)
