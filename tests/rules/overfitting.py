from __future__ import annotations

from collections.abc import Sequence
from math import inf, nan

from monitor.block import ColumnBlock
from tests.rules.series import Case, Value, column

VAL = range(0, 400, 20)
#: Falls to 2 at step 100, then rises by 0.11 every 20 steps. The best median is 2.11, of 2.11 and more 2.32 is enough:
#: from 160 on.
LOSS: Sequence[Value] = [3 - 0.2 * t for t in range(5)] + [2 + 0.11 * t for t in range(15)]


def validated(loss: Sequence[Value] = LOSS, name: str = "val_loss", first: int = 0) -> ColumnBlock:
    return column("logged.value", loss, (name,), [first + step for step in VAL][: len(loss)])


def trained(fall: float, start: float = 3.0, steps: int = 400) -> ColumnBlock:
    """A training loss that falls by this part over the run."""
    return column("loss.value", [start * (1 - fall * t / 400) for t in range(steps)])


def entropy(fall: float) -> ColumnBlock:
    return column("pred_entropy.entropy", [2.0 if t < 120 else fall for t in range(0, 400, 5)], ("cross_entropy",),
                  range(0, 400, 5))  # fmt: skip


def accurate(train: float, held: float) -> tuple[ColumnBlock, ...]:
    both = [[v, held] for v in LOSS]
    return (
        column("logged.value", both, ("val_loss", "val_acc"), list(VAL)),
        column("train_accuracy.accuracy", [train] * 400, ("cross_entropy",)),
        column("train_accuracy.rows", [64.0] * 400, ("cross_entropy",)),
    )


CASES = (
    Case("the training loss falls", (validated(), trained(0.9)), (("val_loss", 160),)),
    Case("under another name", (validated(name="eval/loss"), trained(0.9)), (("eval/loss", 160),)),
    Case("as sure as before", (validated(), trained(0.9), entropy(1.9)), (("val_loss", 160),)),
    Case("far below, and no longer falling", (validated(), trained(0.0, 0.5)), (("val_loss", 160),)),
    Case("not memorised", (*accurate(0.98, 0.6), trained(0.9)), (("val_loss", 160),)),
    Case("near miss: surer, which is hyperfitting", (validated(), trained(0.9), entropy(0.5))),
    Case("near miss: memorised, which may be grokking", (*accurate(1.0, 0.6), trained(0.9))),
    Case("near miss: the training loss has come to rest as high", (validated(), trained(0.0))),
    Case("near miss: it rises as well", (validated(), trained(-0.9, 0.5))),
    Case("of numbers, and best at first", (validated(LOSS[5:], first=20), trained(0.9)), (("val_loss", 80),)),
    Case("near miss: of classes, and best at first", (validated(LOSS[5:]), trained(0.9), entropy(1.9))),
    Case("near miss: 9 % worse", (validated([min(x, 2.29) for x in LOSS if x is not None]), trained(0.9))),
    Case("near miss: two evaluations", (validated(LOSS[:10]), trained(0.9))),
    Case("near miss: no training loss is known", (validated(),)),
    Case("gaps", (validated([v if t % 2 else None for t, v in enumerate(LOSS)]), trained(0.9)), (("val_loss", 220),)),
    Case("constant", (validated([2.0] * 20), trained(0.0))),
    Case("non-finite", (validated([2.0] * 8 + [nan] * 6 + [inf] * 6), trained(0.9))),
)
