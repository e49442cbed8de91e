from __future__ import annotations

from collections.abc import Sequence
from math import nan

from monitor.block import ColumnBlock
from tests.rules.series import Case, Value, column

EVERY = 10


def run(ratio: Sequence[Value], loss: Sequence[float], batch: float = 0.0) -> tuple[ColumnBlock, ...]:
    """Measurements every 10 steps of a loss that is known at every step."""
    steps = range(0, EVERY * len(ratio), EVERY)
    prints = [7.0 + batch * (i % 3) for i in range(len(loss))]
    return (
        column("edge_of_stability.ratio", ratio, steps=steps),
        column("sharpness.loss", [loss[i] for i in steps], steps=steps),
        column("loss.value", loss),
        column("input_rms.fingerprint", prints, ("input[0]",)),
    )


#: Raised at step 50: up to 4 by step 60, back at 1 by step 70, below it later.
THROWN = [1.0] * 51 + [1 + 0.3 * i for i in range(10)] + [4 - 0.3 * i for i in range(10)] + [0.9] * 29
RATIO = [1.0] * 5 + [2.0, 1.6, 1.1, 1.0, 1.0]

CASES = (
    # at step 70 the loss is 4 - .3·9 = 1.3, above what it was; at step 80 it is 0.9
    Case("thrown at 50, landed at 80", run(RATIO, THROWN), (("", 80),), "info"),
    Case("near miss: another batch every step", run(RATIO, THROWN, batch=1.0)),
    Case("several processes: one batch, a part of the data", run(RATIO, THROWN), facts={"processes": 2}),
    Case(
        "another loss was given to be measured",
        (*run(RATIO, THROWN), column("sharpness.of_step", [0.0] * 10, steps=range(0, 100, EVERY))),
    ),
    Case("near miss: the loss has not come back", run(RATIO, [*THROWN[:61], *[4.0] * 39])),
    Case("near miss: it never rose", run(RATIO, [1.0] * 51 + [0.9] * 49)),
    Case("near miss: the ratio stays", run([1.0] * 5 + [2.0] * 5, THROWN)),
    Case("near miss: it was at the edge, not above", run([1.25] * 5 + [1.0] * 5, THROWN)),
    Case("gaps", run([1.0, None, 1.0, None, 1.0, 2.0, None, None, None, 1.0], THROWN), (("", 90),)),
    Case("constant", run([1.0] * 10, [1.0] * 100)),
    Case("non-finite: NaN ratios and losses", run([2.0] + [nan] * 9, [1.0] + [nan] * 99)),
)
