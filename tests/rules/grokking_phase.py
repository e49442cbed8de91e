from __future__ import annotations

from collections.abc import Sequence
from math import nan

from monitor.block import ColumnBlock
from tests.rules.series import Case, Value, column

CE = ("cross_entropy",)


def run(
    held: Sequence[Value], train: Sequence[Value], rows: float = 1000, name: str = "val_acc", every: int = 10
) -> tuple[ColumnBlock, ...]:
    """A held-out accuracy every ``every`` steps; the training accuracy at every step."""
    return (
        column("logged.value", held, (name,), [every * i for i in range(len(held))]),
        column("train_accuracy.accuracy", train, CE),
        column("train_accuracy.rows", [rows] * len(train), CE),
    )


LEARNED = [t / 50 for t in range(50)] + [1.0] * 150  # 99 % at step 50
CASES = (
    Case("memorised at step 50, generalised at 150", run([0.1] * 15 + [1.0] * 5, LEARNED), (("val_acc", 50),)),
    Case("the script logs both", (column("logged.value", [[1.0, 0.1]] * 8, ("train/accuracy", "test/accuracy")),),
         (("test/accuracy", 0),)),
    Case("the gap opens again", run(([0.1] * 6 + [0.9] * 3) * 2, [1.0] * 180), (("val_acc", 0), ("val_acc", 90))),
    Case("near miss: four evaluations", run([0.1] * 9 + [1.0] * 11, LEARNED)),
    Case("near miss: a gap of 0.29", run([0.71] * 20, [1.0] * 200)),
    Case("near miss: 98 % of the training rows", run([0.1] * 20, [0.98] * 200)),
    Case("near miss: batches of 8, every tenth with an error", run([0.1] * 20, ([1.0] * 9 + [0.875]) * 20, rows=8)),
    Case("near miss: no name of a held-out accuracy", run([0.1] * 20, LEARNED, name="accuracy")),
    Case("gaps: evaluations that were not logged neither hold nor break",
         run([0.1, None, 0.1, None, None, 0.1, 0.1, None, 0.1, 1.0], [1.0] * 100), (("val_acc", 0),)),
    Case("constant: nothing is learned", run([0.1] * 20, [0.1] * 200)),
    Case("non-finite accuracies are not judged", run([nan] * 5 + [0.1] * 5, [1.0] * 100), (("val_acc", 50),)),
)  # fmt: skip
