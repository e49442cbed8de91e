from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf, nan

from monitor.block import ColumnBlock
from tests.rules.series import Case, Value, column

NAMES = ("0.weight", "0.bias", "1.weight", "2.weight", "3.weight", "4.weight")
FACTS = {"parameters": [{"name": n, "shape": [4] if n.endswith("bias") else [4, 4]} for n in NAMES]}
#: Of the first ten steps and every tenth after them.
STEPS = [*range(10), *range(10, 300, 10)]


def run(loss: Callable[[int], Value], updates: Sequence[float], steps: int = 300) -> tuple[ColumnBlock, ...]:
    """Relative updates of each parameter in the first ten steps, a hundredth of that later."""
    at = [s for s in STEPS if s < steps]
    ratio = [[u if s < 10 else u / 100 for u in updates] for s in at]
    return column("loss.value", [loss(t) for t in range(steps)]), column("update_ratio.ratio", ratio, NAMES, at)


LARGE = [0.2] * 6
CASES = (
    Case("no better", run(lambda t: 2.3, LARGE), (("", 0),), facts=FACTS),
    Case("worse", run(lambda t: 2.3 if t < 1 else 20.0, LARGE), (("", 0),), facts=FACTS),
    Case("one that is small", run(lambda t: 2.3, [0.2, 0.01, 0.01, 0.2, 0.2, 0.2]), (("", 0),), facts=FACTS),
    Case("near miss: a hundred steps", run(lambda t: 2.3, LARGE, 99), facts=FACTS),
    Case("near miss: matrices that start at 0", run(lambda t: 2.3, [0.3, 0.3, 0.3, 0.3, 0.01, 0.01]), facts=FACTS),
    Case("near miss: vectors alone", run(lambda t: 2.3, [0.01, 0.9, 0.01, 0.01, 0.01, 0.01]), facts=FACTS),
    Case("near miss: the loss falls", run(lambda t: 2.3 * 0.99**t, LARGE), facts=FACTS),
    Case("near miss: updates of a tenth", run(lambda t: 2.3, [0.1] * 6), facts=FACTS),
    Case("gaps", run(lambda t: 2.3 if t % 2 == 0 else None, LARGE), (("", 0),), facts=FACTS),
    Case("constant", run(lambda t: 2.3, [0.001] * 6), facts=FACTS),
    Case("non-finite", run(lambda t: nan if t % 2 else inf, LARGE), facts=FACTS),
)
