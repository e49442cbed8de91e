from __future__ import annotations

from collections.abc import Sequence
from math import nan

from monitor.block import ColumnBlock
from tests.rules.series import Case, Value, column

N = 30
STEPS = range(0, 10 * N, 10)
CREEPING = [2 - 0.01 * i for i in range(N)]


def run(
    ratio: Sequence[Value],
    loss: Sequence[float] = CREEPING,
    sharpness: Sequence[float] = (3.0,) * N,
    lr: Sequence[float] = (1e-5,) * N,
) -> tuple[ColumnBlock, ...]:
    """Measurements every 10 steps; the learning rate is ratio times the largest stable one."""
    return (
        column("edge_of_stability.ratio", ratio, steps=STEPS),
        column("sharpness.loss", loss, steps=STEPS),
        column("sharpness.value", sharpness, steps=STEPS),
        column(
            "edge_of_stability.stable_lr",
            [None if r is None else rate / r for r, rate in zip(ratio, lr, strict=True)],
            steps=STEPS,
        ),
    )


CASES = (
    # the twentieth measurement is that of step 190
    Case("a ten-thousandth of the edge", run([1e-4] * N), (("", 190),), "info"),
    Case("small from the fifth measurement on", run([0.5] * 5 + [1e-4] * 25), (("", 240),)),
    Case(
        "another loss was given to be measured", (*run([1e-4] * N), column("sharpness.of_step", [0.0] * N, steps=STEPS))
    ),
    Case("near miss: a fiftieth of the edge, as of healthy trainings", run([0.02] * N)),
    Case("near miss: one of twenty is larger", run([1e-4] * 14 + [0.01] + [1e-4] * 15)),
    Case("near miss: the loss has arrived", run([1e-4] * N, loss=[1.0] * N)),
    Case(
        "near miss: rows are learnt, and the landscape becomes flat",
        run([1e-4] * N, sharpness=[3 * 0.9**i for i in range(N)]),
    ),
    Case("near miss: warming up", run([1e-4] * N, lr=[1e-7 * (i + 1) for i in range(N)])),
    Case("near miss: a schedule that ends", run([1e-4] * N, lr=[1e-5 * 0.9**i for i in range(N)])),
    Case("gaps", run([1e-4, None] * 15)),
    Case("constant", run([1e-4] * N, loss=[1.0] * N, sharpness=[1.0] * N)),
    Case("non-finite: a stretch with a NaN is not judged", run([1e-4] * 15 + [nan] + [1e-4] * 14)),
)
