from __future__ import annotations

from collections.abc import Sequence
from math import inf, nan

from monitor.block import ColumnBlock
from tests.rules.series import Case, Value, column

LOGGED, TRAINED = "logged.value", "pred_entropy.entropy"
VAL = range(0, 400, 20)
#: Falls to 2 at step 100, then rises by 0.11 every 20 steps: above 2.2 from 140 on.
LOSS: Sequence[Value] = [3 - 0.2 * t for t in range(5)] + [2 + 0.11 * t for t in range(15)]


def entropies(values: list[float], steps: range = range(0, 400, 5)) -> ColumnBlock:
    return column(TRAINED, values, ("cross_entropy",), steps)


def validated(loss: Sequence[Value] = LOSS, name: str = "val_loss", steps: range = VAL) -> ColumnBlock:
    return column(LOGGED, loss, (name,), list(steps)[: len(loss)])


SHARP = [2.0 if step <= 120 else 0.5 for step in range(0, 400, 5)]

CASES = (
    Case("the training rows have become sharp", (validated(), entropies(SHARP)), (("val_loss", 140),)),
    Case("under another name", (validated(name="eval/loss"), entropies(SHARP)), (("eval/loss", 140),)),
    Case(
        "the logged entropy is believed, not the training's",
        (
            column(LOGGED, [[v, 2.0 if t < 12 else 0.4] for t, v in enumerate(LOSS)], ("val_loss", "val_entropy"), VAL),
            entropies(SHARP),
        ),
        (("val_loss", 280),),  # of the last five entropies three are low from the 15th on
    ),
    Case("near miss: overfitting as sharp as before", (validated(), entropies([2.0] * 80))),
    Case("near miss: sharper by 40 %", (validated(), entropies([2.0 if s <= 120 else 1.2 for s in range(0, 400, 5)]))),
    Case("near miss: 9 % worse", (validated([min(x, 2.18) for x in LOSS if x is not None]), entropies(SHARP))),
    Case("near miss: a loss that is not held out", (validated(name="train_loss"), entropies(SHARP))),
    Case("near miss: no entropy is known", (validated(),)),
    Case(
        "gaps", (validated([v if t % 2 else None for t, v in enumerate(LOSS)]), entropies(SHARP)), (("val_loss", 140),)
    ),
    Case("constant", (validated([2.0] * 20), entropies([2.0] * 80))),
    Case("non-finite", (validated([2.0] * 8 + [nan] * 6 + [inf] * 6), entropies([nan] * 80))),
)
