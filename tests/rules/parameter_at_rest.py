from __future__ import annotations

from collections.abc import Sequence
from math import inf, nan

from monitor.block import ColumnBlock
from tests.rules.series import Case, Value, column

REF = "update_ratio.update_norm"
NAMES = ("a", "b")
#: As recorded: the first ten steps and every tenth.
LOOKS = [*range(10), *range(10, 400, 10)]


def changes(
    *rows: Sequence[Value], gradient: Value = 0.0, rate: float = 1e-3, steps: Sequence[int] = LOOKS
) -> tuple[ColumnBlock, ...]:
    at = list(steps)[: len(rows)]
    return (
        column(REF, list(rows), NAMES, at),
        column("grad_norm.norm", [[gradient, 1.0]] * len(at), NAMES, at),
        column("learning_rate.lr", [rate] * len(at), ("group[0]",), at),
    )


FACTS = {"optimizers": [{}], "parameters": [{"name": n, "optimizer": 0, "group": 0} for n in NAMES]}


def still(count: int) -> list[list[Value]]:
    return [[0.0, 1e-3]] * count


MOVES: list[Value] = [1e-9, 1e-3]

CASES = (
    Case("a from the start: looks at 10 to 100", changes(*still(40)), (("a", 100),), "info"),
    Case("a from step 100 on", changes(*[MOVES] * 19, *still(30)), (("a", 190),)),
    Case("both", changes(*[[0.0, 0.0]] * 40), (("a", 100),)),  # b has a gradient
    Case("without a gradient: detached", changes(*still(40), gradient=None), (("a", 100),)),
    Case(
        "a learning rate of 0",
        changes(*[[0.0, 0.0]] * 40, gradient=1.0, rate=0.0),
        (("a", 100), ("b", 100)),
        facts=FACTS,
    ),
    Case(
        "two optimizers in turn, each in rows of its own",
        changes(*[[0.0, None], [None, 1e-3]] * 30, steps=range(0, 600, 10)),
        (("a", 100),),
    ),
    Case("near miss: lost in rounding", changes(*still(40), gradient=1e-9), facts=FACTS),
    Case("near miss: the smallest change there is", changes(*[[1e-45, 1e-3]] * 40)),
    Case("near miss: nine looks", changes(*[MOVES] * 15, *still(9), *[MOVES] * 15)),
    Case("near miss: ten looks in the first ten steps", changes(*still(10), *[MOVES] * 20)),
    Case("near miss: every tenth look moves it", changes(*[*still(9), MOVES] * 4)),
    Case("near miss: nothing is known of gradients", changes(*still(40))[:1]),
    Case("gaps: there at every third look", changes(*[[None if t % 3 else 0.0, 1e-3] for t in range(40)])),
    Case(
        "gaps: absent now and then",
        changes(*[[0.0 if t % 3 else None, 1e-3] for t in range(40)]),
        (("a", 100),),
    ),
    Case("constant: not at 0", changes(*[[1e-3, 1e-3]] * 40)),
    Case("non-finite", changes(*[[nan, inf]] * 40, gradient=nan)),
)
