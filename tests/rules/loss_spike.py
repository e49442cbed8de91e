from __future__ import annotations

from math import inf, nan, sin

from tests.rules.series import Case, column

# 2.5 with a ripple of 0.05: median 2.5, and no point is more than 0.05 from it
WAVE = [2.5 + 0.05 * sin(2.4 * t) for t in range(200)]
ACCURACY = column("train_accuracy.accuracy", [0.5] * 200, ("cross_entropy",))


def put(at: int, value: float) -> list[float]:
    return [*WAVE[:at], value, *WAVE[at + 1 :]]


CASES = (
    Case("3.5 in a ripple of 0.05 around 2.5", (column("loss.value", put(150, 3.5)),), (("", 150),), "warning"),
    Case(
        "a second spike 30 steps later, too small to be seen beside the first, is not; the first is",
        (column("loss.value", [*put(120, 9.0)[:150], 3.5, *WAVE[151:]]),),
        (("", 120),),
    ),
    Case("near miss: 2.6 is 2 amplitudes up, not 3", (column("loss.value", put(150, 2.6)),)),
    Case("near miss: 9 % above a constant", (column("loss.value", [1.0] * 100 + [1.09] + [1.0] * 50),)),
    Case("11 % above a constant", (column("loss.value", [1.0] * 100 + [1.11] + [1.0] * 50),), (("", 100),)),
    Case(
        "near miss: 1e-6 after 1e-8 is nothing where the unit is the nat",
        (column("loss.value", [1e-8] * 150 + [1e-6] + [1e-8] * 49), ACCURACY),
    ),
    Case(
        "near miss: a margin that is kept by most batches",
        (column("loss.value", [0.4 if t in (60, 150) else 0.0 for t in range(200)]),),
    ),
    Case(
        "a tenth of a nat above losses of exactly 0",
        (column("loss.value", [0.4 if t == 150 else 0.0 for t in range(200)]), ACCURACY),
        (("", 150),),
    ),
    Case("near miss: 19 points are no baseline", (column("loss.value", [1.0] * 19 + [9.0]),)),
    Case("20 are", (column("loss.value", [1.0] * 20 + [9.0]),), (("", 20),)),
    Case(
        "both signs: only a record counts, here 40 after a ripple of 1 around 0",
        (column("loss.value", [sin(2.4 * t) for t in range(150)] + [40.0]),),
        (("", 150),),
    ),
    Case(
        "gaps: every third step recorded, a hole of 1,000 steps before the spike",
        (column("loss.value", put(150, 3.5), steps=[3 * t + (1000 if t >= 150 else 0) for t in range(200)]),),
        (("", 1450),),
    ),
    Case("constant", (column("loss.value", [0.7] * 200),)),
    Case(
        "non-finite: neither a spike itself nor part of a baseline",
        (column("loss.value", [nan, inf, *put(150, 3.5)[2:148], nan, inf, 3.5, *WAVE[151:]]),),
        (("", 150),),
    ),
)
