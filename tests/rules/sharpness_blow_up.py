from __future__ import annotations

from math import inf, nan

from tests.rules.series import Case, column

VALUE = "sharpness.value"
STEPS = range(0, 400, 20)

CASES = (
    Case("elevenfold at once", (column(VALUE, [5.0] * 10 + [56.0] * 10, steps=STEPS),), (("", 200),), "warning"),
    Case("exploding", (column(VALUE, [1.0] * 10 + [12.0, 200.0, 1e4] + [1e4] * 7, steps=STEPS),), (("", 200),)),
    Case(
        "near miss: the first rise of a training", (column(VALUE, [0.1, 0.5, 20.0, 30.0] + [40.0] * 16, steps=STEPS),)
    ),
    Case("near miss: tenfold", (column(VALUE, [5.0] * 10 + [50.0] * 10, steps=STEPS),)),
    Case(
        "near miss: by 1.5 times a measurement, 2,000 times in all",
        (column(VALUE, [1.5**i for i in range(20)], steps=STEPS),),
    ),
    Case(
        "near miss: it had been there before", (column(VALUE, [50.0, 5.0, 5.0, 5.0, 5.0, 56.0, 5.0], steps=range(7)),)
    ),
    Case("gaps", (column(VALUE, [5.0, None] * 5 + [60.0] + [None] * 9, steps=STEPS),), (("", 200),)),
    Case("constant", (column(VALUE, [5.0] * 20, steps=STEPS),)),
    Case(
        "non-finite: NaN is not judged, infinity is above everything",
        (column(VALUE, [5.0] * 5 + [nan] * 2 + [inf] + [5.0] * 12, steps=STEPS),),
        (("", 140),),
    ),
)
