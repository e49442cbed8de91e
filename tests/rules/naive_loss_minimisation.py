from __future__ import annotations

from collections.abc import Callable, Sequence
from math import exp, inf, nan

from monitor.block import ColumnBlock
from tests.rules.series import Case, Value, column

CE = ("cross_entropy",)
N = 120
FACTS: dict[str, object] = {
    "parameters": [{"name": "body.weight", "shape": [8, 8]}, {"name": "head.weight", "shape": [10, 8]},
                   {"name": "head.bias", "shape": [10]}],
}  # fmt: skip


def run(
    z: Callable[[int], Value] = lambda i: 2.5,
    rate: Callable[[int], float] = lambda i: exp(-i / 20),
    accuracy: Callable[[int], float] = lambda i: 1.0,
    head: Sequence[float] = (0.9,) * N,
    total: Sequence[float] = (0.6,) * N,
) -> tuple[ColumnBlock, ...]:
    """Points one step apart. The rate falls by e in 20 of them: by 12 over the rule's window of 50."""
    points = range(N)
    return (
        column("zscore_target.mean", [z(i) for i in points], CE),
        column("nlm_rate.rate", [rate(i) for i in points], CE),
        column("train_accuracy.accuracy", [accuracy(i) for i in points], CE),
        column("nlm_cos.cos", [[0.1, h, 0.95] for h in head], ("body.weight", "head.weight", "head.bias")),
        column("nlm_cos.total", total),
    )


HIGH, LOW = [0.9] * N, [0.6] * N
CASES = (
    Case("the output layer grows: the first point with a window before it is 50", run(), (("cross_entropy", 50),),
         facts=FACTS),
    Case("all of it grows, of the output layer nothing is known", run(head=LOW, total=HIGH), (("cross_entropy", 50),)),
    Case("latched: the softmax collapses at 80, the cosine falls, the rate stays",
         run(rate=lambda i: exp(-min(i, 80) / 20), head=[0.9] * 80 + [0.0] * 40), (("cross_entropy", 50),),
         facts=FACTS),
    Case("noise of the z-score by 1 %", run(z=lambda i: 2.5 + 0.0125 * (-1) ** (i // 7)), (("cross_entropy", 50),),
         facts=FACTS),
    Case("near miss: the bias grows, no matrix does", run(head=LOW), facts=FACTS),
    Case("near miss: a cosine of 0.79", run(head=[0.79] * N), facts=FACTS),
    Case("near miss: the z-score rises by 2.5 % for each factor of e", run(z=lambda i: 2.5 * 1.025 ** (i / 20)),
         facts=FACTS),
    Case("near miss: 99.8 % of the training rows", run(accuracy=lambda i: 0.998), facts=FACTS),
    Case("near miss: the rate falls by 2.7 over the window", run(rate=lambda i: exp(-i / 50)), facts=FACTS),
    Case("near miss: two classes, whose z-score is 1 whatever is learned", run(z=lambda i: 1.0), facts=FACTS),
    Case("near miss: smaller logits would be better, the rate is negative", run(rate=lambda i: -exp(-i / 20)),
         facts=FACTS),
    Case("near miss: it ends after nine points", run(accuracy=lambda i: 1.0 if i < 59 else 0.9), facts=FACTS),
    Case("gaps: of 110 and 111 nothing was recorded", run(z=lambda i: None if i in (110, 111) else 2.5),
         (("cross_entropy", 50),), facts=FACTS),
    Case("constant: nothing moves", run(rate=lambda i: 0.5), facts=FACTS),
    Case("non-finite z-scores and rates are not judged",
         run(z=lambda i: nan if i < 10 else 2.5, rate=lambda i: inf if i == 20 else exp(-i / 20)),
         (("cross_entropy", 60),), facts=FACTS),
    Case("non-finite cosines", run(head=[nan] * N, total=[nan] * N), facts=FACTS),
)  # fmt: skip
