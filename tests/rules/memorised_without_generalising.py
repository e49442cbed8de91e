from __future__ import annotations

from collections.abc import Sequence
from math import nan

from monitor.block import ColumnBlock
from tests.rules.series import Case, Value, column

CE = ("cross_entropy",)
DECAY: dict[str, object] = {"optimizers": [{"groups": [{"weight_decay": 0.0}, {"weight_decay": 0.1}]}]}
NONE: dict[str, object] = {"optimizers": [{"groups": [{"weight_decay": 0.0}]}]}


def run(
    held: Sequence[Value], zero: Sequence[float], top1: float = 1 - 1e-7, train: float = 1.0
) -> tuple[ColumnBlock, ...]:
    """A held-out accuracy every tenth step; what the training rows say at every step."""
    n = len(zero)
    return (
        column("logged.value", held, ("val_acc",), [10 * i for i in range(len(held))]),
        column("train_accuracy.accuracy", [train] * n, CE),
        column("train_accuracy.rows", [1000] * n, CE),
        column("train_accuracy.top1_mass", [top1] * n, CE),
        column("loss_zero_frac.frac", zero, CE),
    )


LOW, NO_ZEROS = [0.1] * 40, [0.0] * 400
RISING = [0.1 + 0.003 * i for i in range(40)]  # by 0.057 in 20 evaluations
CASES = (
    Case("collapsed from step 100 on", run(LOW, [0.0] * 100 + [0.2] * 300), (("val_acc", 100),), facts=DECAY),
    Case("no weight decay: the twentieth evaluation is at step 190", run(LOW, NO_ZEROS, 0.9999), (("val_acc", 190),),
         facts=NONE),
    Case("near miss: the same with weight decay somewhere", run(LOW, NO_ZEROS, 0.9999), facts=DECAY),
    Case("near miss: the same with nothing known of it", run(LOW, NO_ZEROS, 0.9999)),
    Case("near miss: the rows still teach", run(LOW, NO_ZEROS, 0.999), facts=NONE),
    Case("near miss: the held-out accuracy rises", run(RISING, NO_ZEROS, 0.9999), facts=NONE),
    Case("near miss: 4 % of zero losses", run(LOW, [0.04] * 400), facts=DECAY),
    Case("near miss: collapsed, but generalised", run([0.9] * 40, [0.2] * 400), facts=NONE),
    Case("near miss: 98 % of the training rows", run(LOW, [0.2] * 400, train=0.98), facts=NONE),
    Case("gaps: evaluations that were not logged neither hold nor break",
         run([0.1, None] * 30, [0.0] * 600, 0.9999), (("val_acc", 380),), facts=NONE),
    Case("constant: nothing is learned", run(LOW, NO_ZEROS, 0.2, train=0.1), facts=NONE),
    Case("non-finite accuracies are not judged", run([nan] * 5 + LOW, [0.2] * 450), (("val_acc", 50),), facts=DECAY),
)  # fmt: skip
