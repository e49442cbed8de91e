from __future__ import annotations

from collections.abc import Sequence
from math import nan

from monitor.block import ColumnBlock
from tests.rules.series import Case, Value, column

CE = ("cross_entropy",)


def run(
    zero: Sequence[Value],
    rows: float = 1000,
    top1: float = 1 - 1e-7,
    accuracy: float = 1.0,
    steps: list[int] | None = None,
) -> tuple[ColumnBlock, ...]:
    n = len(zero)
    return (
        column("loss_zero_frac.frac", zero, CE, steps),
        column("loss_zero_frac.rows", [rows] * n, CE, steps),
        column("train_accuracy.accuracy", [accuracy] * n, CE, steps),
        column("train_accuracy.top1_mass", [top1] * n, CE, steps),
    )


RAMP = [t / 1000 for t in range(200)]  # reaches 5 % at step 50
CASES = (
    Case("a ramp that reaches 5 % at step 50", run(RAMP), (("cross_entropy", 50),), "warning"),
    Case("half of the rows", run([0.0] * 9 + [0.5] * 9), (("cross_entropy", 9),), "critical"),
    Case("near miss: 4.9 %", run([0.049] * 100)),
    Case("near miss: only two points in a row", run([0.0, 0.3, 0.3, 0.0] * 20)),
    Case("near miss: the other rows still teach: loss 1e-3", run([0.6] * 100, top1=0.999)),
    Case("near miss: one row in 1,000 is still wrong", run([0.6] * 100, accuracy=0.999)),
    Case("near miss: batches of 8, one easy row in every third", run([0.0, 0.0, 0.125] * 40, rows=8)),
    Case("batches of 8, one easy row in each", run([0.0] * 40 + [0.125] * 40, rows=8), (("cross_entropy", 46),)),
    Case(
        "gaps: points that are missing neither hold nor break",
        run([0.0, 0.2, None, 0.2, None, 0.2, 0.0], steps=[0, 10, 11, 20, 500, 501, 502]),
        (("cross_entropy", 10),),
    ),
    Case("constant zero", run([0.0] * 100)),
    Case("non-finite shares are not judged", run([nan] * 5 + [0.2, nan, 0.2, 0.2]), (("cross_entropy", 5),)),
    Case(
        "soft targets have no accuracy: their probabilities decide",
        tuple(c for c in run([0.2] * 9) if c.column != "accuracy"),
        (("cross_entropy", 0),),
    ),
)
