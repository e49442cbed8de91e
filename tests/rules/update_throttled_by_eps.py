from __future__ import annotations

from collections.abc import Sequence
from math import inf, nan

from monitor.block import ColumnBlock
from tests.rules.series import Case, Value, column

REF = "eps_ratio.ratio"
STEPS = range(0, 2000, 100)
NAMES = tuple(f"w{i}" for i in range(10))


def ratios(*rows: Sequence[Value]) -> ColumnBlock:
    return column(REF, list(rows), NAMES, list(STEPS)[: len(rows)])


def learning(accuracy: float = 0.4) -> tuple[ColumnBlock, ...]:
    every = range(0, 2000, 10)
    return (
        column("train_accuracy.accuracy", [accuracy] * len(every), ("cross_entropy",), every),
        column("train_accuracy.top1_mass", [accuracy] * len(every), ("cross_entropy",), every),
    )


LOW: list[Value] = [1e-4] * 10
ONE: list[Value] = [0.2, *[1e-4] * 9]
HUGE: list[Value] = [*[1e-4] * 9, 3.0]

CASES = (
    Case("one of ten at 0.2", (ratios(LOW, LOW, *[ONE] * 8), *learning()), (("", 200),), "warning"),
    Case("one of ten at 3", (ratios(LOW, *[HUGE] * 8), *learning()), (("", 100),), "critical"),
    Case("near miss: one of ten just below 0.1", (ratios(*[[0.0999, *LOW[1:]]] * 8), *learning())),
    Case("near miss: everything is learnt", (ratios(*[HUGE] * 8), *learning(0.99))),
    Case("near miss: no classification", (ratios(*[HUGE] * 8),)),
    Case(
        "near miss: two of ten are rounding noise, as biases in front of a batch norm",
        (
            ratios(*[[0.2, 3.0, *LOW[2:]]] * 8),
            column("eps_ratio.grad_rms", [[1e-7, 1e-8, *[0.05] * 8]] * 8, NAMES, list(STEPS)[:8]),
            *learning(),
        ),
    ),
    Case(
        "two of ten at a thousandth of the others",
        (
            ratios(*[[0.2, 3.0, *LOW[2:]]] * 8),
            column("eps_ratio.grad_rms", [[5e-5, 5e-5, *[0.05] * 8]] * 8, NAMES, list(STEPS)[:8]),
            *learning(),
        ),
        (("", 0),),
        "critical",
    ),
    Case("near miss: two looks", (ratios(LOW, ONE, ONE, LOW, ONE, ONE, LOW), *learning())),
    Case("gaps", (ratios(*[[None if t % 2 else 0.5, *LOW[1:]] for t in range(9)]), *learning())),
    Case(
        "gaps: a parameter without gradients is not counted",
        (ratios(*[[None, 0.5, *LOW[2:]]] * 9), *learning()),
        (("", 0),),
    ),
    Case("constant", (ratios(*[LOW] * 9), *learning())),
    Case("non-finite", (ratios(*[[nan, *LOW[1:]]] * 9), *learning())),
    Case("non-finite: inf is large", (ratios(*[[inf, *LOW[1:]]] * 9), *learning()), (("", 0),), "critical"),
)
