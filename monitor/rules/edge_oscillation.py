"""The gradient swings, for the training is at its edge of stability.

What it means:
    The sharpness has grown until the learning rate is as large as it may be. From then on the training leaves the
    valley's floor again and again, swings from side to side for a few steps with gradients many times their usual size,
    and by that comes to where the valley is flatter. Nothing is wrong with the data: it is how training on full batches
    goes on, with Adam as with plain descent, and the loss goes on falling over hundreds of steps.

How it is decided:
    The norm of a gradient jumps as in the rule gradient_spike, to less than 100 times its median; the ratio to the edge
    of stability, of the (preconditioned) sharpness to 2/η, 38/η or whatever the optimizer allows, was 0.9 or more when
    it was measured last; every step trains on the same batch, in one process; the loss that was measured is that of the
    training; and the learning rate had not been raised within 10 steps. Jumps of less than 500 points distance are one
    finding.

What to do:
    Nothing, if the loss goes on falling. For a quieter end let the learning rate fall: the edge goes up with its
    inverse. Without `curvature=` such jumps are called gradient spikes, for then nothing is known of the edge.

When it is wrong:
    The ratio is that of an earlier step; something else may have happened since. What the loss does is judged by rules
    of its own: above_edge_of_stability, loss_spike and divergence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from monitor.rule import Hits, Remedy, Rule, Window
from monitor.rules._gradient import NEEDS, PARAMS, RATIO, jumps, swings
from monitor.rules._series import latest

SHARPNESS = ("preconditioned_sharpness.value", "sharpness.value")
THRESHOLD = "edge_of_stability.threshold"


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Jumps that the edge of stability explains."""
    if not len(window[RATIO].steps):
        return
    jumped = jumps(window, p)
    mask, ratio = swings(window, jumped, p)
    known = jumped.found.known & ~np.isnan(ratio)
    everywhere = np.zeros(mask.shape)
    evidence = {"ratio": ratio + everywhere, "norm": jumped.norm}
    if mask.any():
        scaled, plain = (latest(window[ref], jumped.steps, ("",))[0] for ref in SHARPNESS)
        sharpness = np.where(np.isnan(scaled), plain, scaled)
        threshold = latest(window[THRESHOLD], jumped.steps, ("",))[0]
        evidence |= {"sharpness": sharpness + everywhere, "largest_stable": threshold + everywhere}
    yield Hits(jumped.steps, jumped.modules, mask, known, jumped.times, p["times"], evidence)


RULE = Rule(
    id="edge_oscillation",
    title="Oscillation at the edge of stability",
    severity="info",
    site="gradient",
    message="The gradient of {module} swings to {value:.3g} times its usual size: the sharpness is {ratio:.3g} times "
    "what the learning rate allows.",
    refute="the ratio to the edge of stability, measured at every step, is below 0.9 just before a jump",
    remedies=(
        Remedy("nothing, if the loss goes on falling"),
        Remedy("let the learning rate fall towards the end"),
    ),
    params=PARAMS,
    needs=(RATIO, *(ref for ref in NEEDS if ref != RATIO), *SHARPNESS, THRESHOLD),  # first what only a few runs have
    check=check,
    lookback=100,
    release=500,
    doc=__doc__ or "",
)
