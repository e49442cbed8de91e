from __future__ import annotations

from collections.abc import Sequence
from math import inf, log, nan, sin

from monitor.block import ColumnBlock
from tests.rules.series import Case, Value, column

N = 400
LN10 = log(10)
#: Four parameters, of which three stand still.
MOVES = (
    column("update_ratio.update_norm", [[0.0, 0.0, 0.0, 1e-3]] * 40, ("a", "b", "c", "d"), range(0, 400, 10)),
    column("update_ratio.ratio", [[0.0, None, 0.0, 1e-2]] * 40, ("a", "b", "c", "d"), range(0, 400, 10)),
)


def trained(
    loss: Sequence[Value],
    accuracy: Sequence[Value] | float,
    classes: float = 10,
    rate: Sequence[Value] | float = 1e-3,
    sure: float = 0.2,
    steps: Sequence[int] | None = None,
) -> tuple[ColumnBlock, ...]:
    n = len(loss)
    at = list(range(n) if steps is None else steps)
    right: Sequence[Value] = accuracy if isinstance(accuracy, Sequence) else [accuracy] * n
    rates: Sequence[Value] = rate if isinstance(rate, Sequence) else [rate] * n
    return (
        column("loss.value", loss, steps=steps),
        column("train_accuracy.accuracy", right, ("cross_entropy",), steps),
        column("train_accuracy.top1_mass", [sure] * n, ("cross_entropy",), steps),
        column("learning_rate.lr", rates, ("group[0]",), steps),
        # every second look is too large to hold ln K, which is remembered
        column("log_z.mean", [3.0, 1e7] * (n // 10), ("cross_entropy",), at[: n // 10 * 10 : 5]),
        column("log_z.excess", [3.0 - log(classes), 1e7] * (n // 10), ("cross_entropy",), at[: n // 10 * 10 : 5]),
        *MOVES,
    )


GUESSING = [LN10 + 0.02 * sin(2.4 * t) for t in range(N)]
#: Learns at step 100: from 299 on all of the window lies below.
LEARNING = [2.3] * 100 + [1.0] * 300

CASES = (
    Case("at ln 10 for ever", trained(GUESSING, 0.1), (("", 199),), "warning"),
    Case("uphill: the sign of the loss", trained([-2.3 - 0.01 * t for t in range(N)], 0.1, sure=0.99), (("", 199),)),
    Case("lost again: the mean of 200 is above 2.256 when 3 of the old losses are left",
         trained([0.5] * 100 + [2.28] * 300, [0.9] * 100 + [0.1] * 300), (("", 297),)),
    Case("binary", trained([log(2)] * N, 0.51, classes=2), (("", 199),)),
    Case("near miss: 199 points", trained(GUESSING[:199], 0.1)),
    Case("near miss: 97.9 % of ln 10", trained([0.979 * LN10] * N, 0.1)),
    Case("near miss: 126 % of ln 10, another loss beside it", trained([1.26 * LN10] * N, 0.1)),
    Case("near miss: 13 % right", trained(GUESSING, 0.13)),
    Case("near miss: learns at step 100", trained(LEARNING, 0.1)),
    Case("near miss: a negative loss of a policy, which is not sure", trained([-0.3] * N, 0.1, sure=0.3)),
    Case("near miss: a negative loss of a policy that is sure, and right", trained([-0.3] * N, 0.95, sure=0.95)),
    Case("near miss: a warm-up of the learning rate", trained(GUESSING, 0.1, rate=[1e-5 * (t + 1) for t in range(N)])),
    Case("near miss: two losses", (
        column("loss.value", [[LN10, LN10]] * N, ("optimizer[0]", "optimizer[1]")), *trained(GUESSING, 0.1)[1:])),
    Case("near miss: one of two heads has learned", (
        *trained(GUESSING, 0.1)[:1],
        column("train_accuracy.accuracy", [[0.1, 0.9]] * N, ("cross_entropy", "cross_entropy[1]")),
        column("log_z.mean", [[3.0, 3.0]], ("cross_entropy", "cross_entropy[1]")),
        column("log_z.excess", [[3.0 - LN10, 3.0 - LN10]], ("cross_entropy", "cross_entropy[1]")))),
    Case("near miss: no classification", (column("loss.value", GUESSING),)),
    Case("gaps: every second point missing, steps far apart",
         trained([x if t % 2 else None for t, x in enumerate(GUESSING + GUESSING)], 0.1,
                 steps=[7 * t for t in range(2 * N)]), (("", 7 * 399),)),
    Case("constant: a loss of 0 with everything right", trained([0.0] * N, 1.0)),
    Case("non-finite", trained([nan, inf] * 200, 0.1)),
)  # fmt: skip
