from __future__ import annotations

from collections.abc import Sequence
from math import inf, nan

from monitor.block import ColumnBlock
from tests.rules.series import Case, Value, column

R = ("mlp.gate",)


def router(z: Sequence[Value], early: Sequence[Value] | float = 10) -> tuple[ColumnBlock, ...]:
    """A router recorded every fifth step, whose z-loss was once 10."""
    at = [5 * t for t in range(len(z))]
    past: Sequence[Value] = early if isinstance(early, Sequence) else [None if s < 200 else early for s in at]
    others = {"experts": 8.0, "top_k": 2.0, "tokens": 64.0, "max_logit": 9.0}
    return (
        column("router_balance.z", z, R, at),
        column("router_balance.early_z", past, R, at),
        *(column(f"router_balance.{n}", [v] * len(z), R, at) for n, v in others.items()),
    )


CASES = (
    Case("sixty times ten from step 300 on", router([10.0] * 60 + [600.0] * 30), (("mlp.gate", 300),)),
    Case("near miss: four times", router([10.0] * 60 + [40.0] * 60)),
    Case("near miss: ten times, but small", router([4.0] * 60 + [40.0] * 60, early=4.0)),
    Case("near miss: 19 points", router([10.0] * 60 + [600.0] * 19 + [10.0] * 30)),
    Case("near miss: large from the beginning", router([600.0] * 120, early=600.0)),
    Case("near miss: nothing to compare with", router([10.0] * 20 + [600.0] * 60, early=[None] * 80)),
    Case("gaps", router([10.0] * 60 + [None, 600.0] * 25), (("mlp.gate", 305),)),
    Case("constant, from the first step that is judged", router([600.0] * 80), (("mlp.gate", 200),)),
    Case(
        "non-finite: inf is large, NaN is not judged",
        router([10.0] * 60 + [nan] * 30 + [inf] * 30),
        (("mlp.gate", 450),),
    ),
)
