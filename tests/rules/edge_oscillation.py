from __future__ import annotations

from collections.abc import Sequence
from math import inf, nan

from monitor.block import ColumnBlock
from tests.rules.gradient_spike import WAVE
from tests.rules.series import Case, Value, column


def run(
    norms: Sequence[Value],
    ratio: Sequence[Value],
    every: int = 50,
    batch: float = 0.0,
    lr: Sequence[float] = (1e-3,) * 200,
) -> tuple[ColumnBlock, ...]:
    """Norms of one gradient, and the ratio to the edge at every fiftieth step; the sharpness is 38,000 times it."""
    measured = range(0, every * len(ratio), every)
    return (
        column("grad_norm.norm", norms, ("w",)),
        column("edge_of_stability.ratio", ratio, steps=measured),
        column("edge_of_stability.threshold", [38e3] * len(ratio), steps=measured),
        column("preconditioned_sharpness.value", [None if r is None else 38e3 * r for r in ratio], steps=measured),
        column("sharpness.value", [20.0] * len(ratio), steps=measured),
        column("input_rms.fingerprint", [7 + batch * (i % 5) for i in range(200)], ("input[0]",)),
        column("learning_rate.lr", lr, ("group[0]",)),
    )


def jump(times: float = 9.0, at: Sequence[int] = (160,)) -> list[float]:
    """Norms about 1, and another at some steps."""
    return [times if i in at else x for i, x in enumerate(WAVE)]


CLIMBS = (0.5, 0.7, 0.92, 0.97)
CASES = (
    Case("a swing at the edge", run(jump(), CLIMBS), (("w", 160),), "info"),
    Case("two, one after the other, are one finding", run(jump(at=(110, 160)), CLIMBS), (("w", 110),)),
    Case("the edge is reached at step 150: a jump before is none", run(jump(at=(110, 160)), (0.5, 0.5, 0.5, 1.1)),
         (("w", 160),)),
    Case("near miss: below the edge", run(jump(), (0.5, 0.7, 0.8, 0.89))),
    Case("near miss: another batch every step", run(jump(), CLIMBS, batch=1.0)),
    Case("near miss: one of several processes, whose batch is a part", run(jump(), CLIMBS), facts={"processes": 2}),
    Case("near miss: too large for a swing", run(jump(101), CLIMBS)),
    Case("near miss: the learning rate had been raised", run(jump(), CLIMBS, lr=[1e-3] * 155 + [3e-3] * 45)),
    Case(
        "near miss: another loss was given to be measured",
        (*run(jump(), CLIMBS), column("sharpness.of_step", [0.0] * 4, steps=range(0, 200, 50))),
    ),
    Case("near miss: no curvature was measured", run(jump(), ())),
    Case("near miss: no jump", run(WAVE, CLIMBS)),
    Case("gaps: what was known last counts", run(jump(), (0.5, 0.95, None, None)), (("w", 160),)),
    Case("constant", run([1.0] * 200, (1.0,) * 4)),
    Case("non-finite: NaN is no ratio, and no norm", run([*WAVE[:160], nan, inf, *WAVE[162:]], (0.5, 1.0, 1.0, nan))),
)  # fmt: skip
