from __future__ import annotations

from math import e, inf, log, nan

from monitor.block import ColumnBlock
from tests.rules.series import Case, Value, column

LOSS = ("cross_entropy",)
STEPS = [*range(10), *range(10, 400, 5)]


def logits(
    mean: Value, low: Value = 0.01, high: Value = 0.9, classes: float = 10, count: int = 30
) -> tuple[ColumnBlock, ...]:
    """Rows of probabilities have a log Z between 1 + ln K − 1 and ln(e + K − 1); of it only ln K counts here."""
    given = {"logit_scale.mean": mean, "logit_scale.min": low, "logit_scale.max": high}
    given |= {"log_z.mean": log(e + classes - 1), "log_z.excess": log(e + classes - 1) - log(classes)}
    return tuple(column(ref, [value] * count, LOSS, STEPS[:count]) for ref, value in given.items())


def then(*pieces: tuple[ColumnBlock, ...]) -> tuple[ColumnBlock, ...]:
    """The pieces one after the other."""
    found = []
    for several in zip(*pieces, strict=True):
        values = [v if h else None for c in several for v, h in zip(c.values[:, 0], c.has[:, 0], strict=True)]
        found.append(column(several[0].ref, values, LOSS, STEPS[: len(values)]))
    return tuple(found)


CASES = (
    Case("ten probabilities", logits(0.1), (("cross_entropy", 0),), "warning"),
    Case("50,257 probabilities, rounded", logits(1.00002 / 50257, 0.0, 1.0, classes=50257), (("cross_entropy", 0),)),
    Case("two, of a softmax put in at step 10", then(logits(0.3, -1, 2, 2, 10), logits(0.5, classes=2, count=15)),
         (("cross_entropy", 10),)),
    Case("near miss: logits of the same mean", logits(0.1, -0.01, 0.9)),
    Case("near miss: one above 1", logits(0.1, 0.0, 1.01)),
    Case("near miss: sigmoids, which need not sum to 1", logits(0.102)),
    Case("near miss: nine looks", then(logits(0.1, count=9), logits(0.2, count=20))),
    Case("near miss: log-probabilities", logits(-3.2, -9.0, -0.1)),
    Case("gaps", then(*[logits(0.1, count=4), logits(None, count=2)] * 4), (("cross_entropy", 0),)),
    Case("constant: logits of 0", logits(0.0, 0.0, 0.0)),
    Case("non-finite", logits(nan, nan, inf)),
)  # fmt: skip
