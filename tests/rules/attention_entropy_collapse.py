from __future__ import annotations

from collections.abc import Sequence
from math import inf, nan

from monitor.block import ColumnBlock
from tests.rules.series import Case, Value, column

HEADS = tuple(f"blocks.0.attn[{h}]" for h in range(4))
TENTH = range(0, 200, 10)


def series(entropy: Sequence[Sequence[Value]], logit: Sequence[Sequence[Value]]) -> tuple[ColumnBlock, ...]:
    heads, steps = HEADS[: len(entropy[0])], TENTH[: len(entropy)]
    return (
        column("attn_entropy.normalised", entropy, heads, steps),
        column("attn_logit_max.found", logit, heads, steps),
    )


CASES = (
    Case(
        "the second head collapses at the eighth point",
        series([[0.6, 0.5]] * 8 + [[0.6, 0.001]] * 12, [[8.0, 30.0]] * 8 + [[8.0, 400.0]] * 12),
        ((HEADS[1], 80),),
        "warning",
    ),
    Case(
        "near miss: many sharp heads, none with large logits",
        series([[0.001, 0.005, 0.01, 0.7]] * 20, [[30.0, 20.0, 49.0, 9.0]] * 20),
    ),
    Case("near miss: large logits, but rows that look around", series([[0.3, 0.021]] * 20, [[900.0, 900.0]] * 20)),
    Case(
        "near miss: one head is sharp, another has the logits",
        series([[0.001, 0.5]] * 20, [[20.0, 300.0]] * 20),
    ),
    Case("near miss: two points", series([[0.5]] * 9 + [[0.001]] * 2 + [[0.5]] * 9, [[90.0]] * 20)),
    Case(
        "gaps: the logits are missing at first",
        series([[0.001]] * 20, [[None]] * 5 + [[90.0]] * 15),
        ((HEADS[0], 50),),
    ),
    Case("constant", series([[0.5, 0.0]] * 20, [[5.0, 5.0]] * 20)),
    Case(
        "non-finite: NaN is not judged, an infinite logit is large",
        series([[0.5]] * 5 + [[nan]] * 5 + [[0.0]] * 10, [[9.0]] * 5 + [[90.0]] * 5 + [[inf]] * 10),
        ((HEADS[0], 100),),
    ),
)
