from __future__ import annotations

from math import exp, inf, nan, sin

from tests.rules.series import Case, column

X = ("input[0]",)
WAVE = [1.0 + 0.02 * sin(2.4 * t) for t in range(250)]


def put(at: int, value: float) -> list[float]:
    return [*WAVE[:at], value, *WAVE[at + 1 :]]


CASES = (
    Case(
        "×100 for one batch at step 200",
        (column("input_rms.rms", put(200, 100.0), X),),
        (("input[0]", 200),),
        "warning",
    ),
    Case(
        "of two inputs the one that jumped",
        (column("input_rms.rms", [[x, 1.0] for x in put(200, 100.0)], ("image", "mask")),),
        (("image", 200),),
    ),
    Case("near miss: ×7.5", (column("input_rms.rms", put(200, 7.5), X),)),
    Case(
        "near miss: ×20 among noise levels between e^-3 and e^3",
        (column("input_rms.rms", [exp(3 * sin(2.4 * t)) for t in range(200)] + [20.0], ("sigma",)),),
    ),
    Case(
        "gaps: an input that is given every fifth step",
        (column("input_rms.rms", [x if t % 5 == 0 else None for t, x in enumerate(put(200, 100.0))], X),),
        (("input[0]", 200),),
    ),
    Case("constant", (column("input_rms.rms", [[1.0, 0.0]] * 200, ("image", "mask")),)),
    Case("a constant that jumps", (column("input_rms.rms", [1.0] * 50 + [10.0] + [1.0] * 9, X),), (("input[0]", 50),)),
    Case(
        "non-finite: not judged here, and no part of the baseline",
        (column("input_rms.rms", [*WAVE[:190], nan, inf, *WAVE[192:200], 100.0, inf], X),),
        (("input[0]", 200),),
    ),
)
