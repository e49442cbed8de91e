from __future__ import annotations

from math import inf, log, nan

from monitor.block import ColumnBlock
from tests.rules.series import Case, Value, column

LOSS = ("cross_entropy",)
STEPS = (0, 1, 2, 5)


def start(
    cost: float, sure: Value = 0.95, right: Value = 0.1, rows: float = 64, classes: int = 10, first: int = 0
) -> tuple[ColumnBlock, ...]:
    """Logits of mean 3 at the first four looks, a random one of which costs ``cost`` nats."""
    given = {
        "log_z.mean": 3 + cost,
        "log_z.excess": 3 + cost - log(classes),
        "logit_scale.mean": 3.0,
        "logit_scale.row_std": 20.0,
        "train_accuracy.accuracy": right,
        "train_accuracy.top1_mass": sure,
        "train_accuracy.rows": rows,
    }
    return tuple(column(ref, [value] * 4, LOSS, [first + s for s in STEPS]) for ref, value in given.items())


CASES = (
    Case("weights times 10", start(70.0), ((LOSS[0], 0),), "warning"),
    Case("two classes", start(4.0, 0.98, 0.48, classes=2), ((LOSS[0], 0),)),
    Case("50,257 tokens", start(44.0, 0.9, 0.0, classes=50257), ((LOSS[0], 0),)),
    Case("near miss: 50,257 tokens", start(43.0, 0.9, 0.0, classes=50257)),
    Case("near miss: sure and right", start(70.0, 0.95, 0.5)),
    Case("near miss: wrong and not sure", start(9.3, 0.55, 0.1)),
    Case("near miss: near ln K", start(2.6, 0.7, 0.1)),
    Case("near miss: 15 rows", start(70.0, rows=15)),
    Case("near miss: a margin, never right in 66 of 10 classes", start(70.0, right=0.0, rows=66)),
    Case("never right in 65", start(70.0, right=0.0, rows=65), ((LOSS[0], 0),)),
    Case("near miss: resumed, or later", start(70.0, first=1)),
    Case("gaps: labels that are no classes", start(70.0, None, None)),
    Case("constant: all logits the same", start(log(10), 0.1, 0.1)),
    Case("non-finite", start(nan, nan, 0.1)),
    Case("non-finite: infinite logits", start(inf, 0.95, 0.1)),
)
