from __future__ import annotations

from collections.abc import Sequence
from math import inf, nan

from monitor.block import ColumnBlock
from tests.rules.series import Case, Value, column

R = ("mlp.gate",)


def router(used: Sequence[Value], tokens: float = 1024, experts: float = 64, k: float = 8) -> tuple[ColumnBlock, ...]:
    """A router recorded every fifth step."""
    at = [5 * t for t in range(len(used))]
    others = {"experts": experts, "top_k": k, "tokens": tokens, "mean_normalised": 0.2}
    return (
        column("router_balance.effective", used, R, at),
        *(column(f"router_balance.{n}", [v] * len(used), R, at) for n, v in others.items()),
    )


CASES = (
    Case("nine of 64 from step 100 on", router([60.0] * 20 + [9.0] * 30), (("mlp.gate", 100),)),
    Case("near miss: a quarter of 64", router([16.01] * 60)),
    Case("near miss: 19 points", router([60.0] * 20 + [9.0] * 19 + [60.0] * 20)),
    Case("near miss: half of the experts are dead", router([32.0] * 60)),
    Case("near miss: 24 tokens", router([9.0] * 60, tokens=24)),
    Case("near miss: all experts for every token", router([8.0] * 60, experts=8)),
    Case("gaps", router([60.0] * 20 + [None, 9.0] * 25), (("mlp.gate", 105),)),
    Case("constant, from the first step that is judged", router([8.0] * 40), (("mlp.gate", 50),)),
    Case("one expert of eight", router([1.5] * 60, experts=8, k=1), (("mlp.gate", 50),)),
    Case("non-finite", router([nan, inf, nan] * 3 + [nan] * 40)),
)
