from __future__ import annotations

from math import inf, nan

from tests.rules.series import Case, column

WEIGHTS = ("first.weight", "last.weight")
CASES = (
    Case(
        "one NaN in an input at step 7",
        (column("input_rms.nonfinite", [0] * 7 + [1] + [0] * 4, ("input[0]",)),),
        (("input[0]", 7),),
        "critical",
    ),
    Case(
        "backward begins at the end: of two gradients that break in one step the last module comes first",
        (column("grad_norm.nonfinite", [[0, 0]] * 3 + [[2, 5]] * 2, WEIGHTS),),
        (("last.weight", 3), ("first.weight", 3)),
    ),
    Case(
        "an overflow spreads: logits, loss, gradient, then the parameter it updated",
        (
            column("logit_scale.max_abs", [9.0, 9.5, inf, nan], ("cross_entropy",)),
            column("loss.value", [1.0, 0.9, nan, nan]),
            column("grad_norm.nonfinite", [[0], [0], [4], [4]], ("w",)),
            column("update_ratio.update_norm", [[0.1], [0.1], [nan], [nan]], ("w",)),
            column("param_norm.norm", [[3.0], [3.0], [nan], [nan]], ("w",)),
        ),
        (("cross_entropy", 2), ("", 2), ("w", 2), ("w", 2), ("w", 2)),
    ),
    Case(
        "near miss: −inf masks a class, and the loss is finite",
        (
            column("logit_scale.max_abs", [inf] * 5, ("cross_entropy",)),
            column("loss.value", [1.0, 0.9, 0.8, 0.7, 0.6]),
        ),
    ),
    Case(
        "gaps: nothing recorded is no NaN, and a NaN after a gap is found",
        (column("loss.value", [1.0, None, None, 1.0, nan], steps=[0, 1, 2, 10, 40]),),
        (("", 40),),
    ),
    Case("constant", (column("loss.value", [0.0] * 50), column("grad_norm.nonfinite", [[0, 0]] * 50, WEIGHTS))),
    Case("non-finite from the first step on", (column("loss.value", [inf] * 5),), (("", 0),)),
)
