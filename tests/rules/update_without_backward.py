from __future__ import annotations

from math import nan

from monitor.block import ColumnBlock
from tests.rules.gradients_carried_over import looks
from tests.rules.series import Case, Value


def updates(*pairs: tuple[Value, Value]) -> tuple[ColumnBlock, ...]:
    """Looks as (calls of backward, share of the gradient used before)."""
    return looks([share for _, share in pairs], [backwards for backwards, _ in pairs])


OWN, AGAIN, UNSEEN, NONE = (1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (None, None)

CASES = (
    Case("and then one again", updates(*[AGAIN, OWN] * 12, *[OWN] * 60, *[AGAIN, OWN] * 3), (("", 5), ("", 2449))),
    Case("two updates for one backward", updates(*[AGAIN, OWN] * 12), (("", 5),), "warning"),
    Case("three", updates(*[AGAIN, AGAIN, OWN] * 8), (("", 4),)),
    Case("from step 31 on", updates(*[OWN] * 10, *[AGAIN, OWN] * 10), (("", 155),)),
    Case("near miss: no backward is ever seen", updates(*[AGAIN] * 30)),
    Case("near miss: gradients of their own, made where nobody looks", updates(*[UNSEEN, OWN] * 15)),
    Case("near miss: nearly the same gradient", updates(*[(0.0, 0.999), OWN] * 15)),
    Case("near miss: twice by accident", updates(OWN, AGAIN, AGAIN, *[OWN] * 20)),
    Case("near miss: never zeroed", updates(*[(1.0, 1.0)] * 30)),
    Case("gaps", updates(*[AGAIN, NONE, OWN] * 8), (("", 7),)),
    Case("constant: one backward each", updates(*[OWN] * 30)),
    Case("non-finite", updates(*[(0.0, nan), (1.0, nan)] * 15)),
)
