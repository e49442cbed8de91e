from __future__ import annotations

from math import nan

from monitor.block import ColumnBlock
from tests.rules.series import Case, column

STEPS = [*range(10), *range(20, 1020, 20)]


def looks(
    within: float, pooled: float, labels: float = 32, number: int = 40, every: int = 1
) -> tuple[ColumnBlock, ...]:
    """The same at each look, or at some of them."""
    values = {"mean_within": within, "pooled": pooled, "excess": (within - pooled) / (1 - pooled), "labels": labels}
    there = [i % every == 0 for i in range(number)]
    columns = {f"label_mixing.{name}": [v if t else None for t in there] for name, v in values.items()}
    columns["label_mixing.looks"] = [float(i + 1) if t else None for i, t in enumerate(there)]
    return tuple(column(ref, v, ("cross_entropy",), steps=STEPS[:number]) for ref, v in columns.items())


CASES = (
    Case("one class of ten", looks(1.0, 0.1), (("cross_entropy", 200),)),  # the 20th look
    Case("one class of two, three labels", looks(1.0, 0.5, 3, 60), (("cross_entropy", 800),)),  # 50 looks times 2
    Case("near miss: drawn at random", looks(0.1, 0.1)),
    Case("near miss: four classes of a thousand, sixteen of each", looks(15 / 63, 0.001, 64)),
    Case("near miss: one class of all but a tenth", looks(1.0, 0.81)),
    Case("near miss: too few looks", looks(1.0, 0.1, number=19)),
    Case("gaps", looks(1.0, 0.1, every=2), (("cross_entropy", 220),)),
    Case("constant", looks(0.5, 0.5)),
    Case("non-finite", looks(nan, 0.1)),
)
