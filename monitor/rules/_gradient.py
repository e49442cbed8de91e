"""What two rules over gradients share: jumps of a norm, and which of them the edge of stability explains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from monitor.metric import Array, Mask
from monitor.rule import Param, Window
from monitor.rules._curvature import OF_STEP, of_step, whole_data
from monitor.rules._series import CALIBRATION, Spikes, Steps, exactly, latest, raised, spikes

RATIO = "edge_of_stability.ratio"
#: What the last two parameters are calibrated on: a tanh network on 256 digits with Adam at learning rates from 1e-3 to
#: 1e-2, RMSprop, plain descent and momentum, curvature measured every 20 to 60 steps.
EDGES = "calibrated on 10 trainings on full batches at the edge"
#: Columns that `jumps` and `swings` read, and the parameters of both.
NEEDS = ("grad_norm.norm", "clip.coefficient", "learning_rate.lr", RATIO, OF_STEP, "input_rms.fingerprint")
PARAMS = (
    Param("times", 5, "times the median", "Stable-SPAM (arXiv 2502.17055), norm ratio; none in calibration"),
    Param("sigmas", 8, "robust σ of the logarithm", CALIBRATION),
    Param("window", 100, "points", "as loss_z and grad_norm_z"),
    Param("minimum", 50, "points", CALIBRATION),
    Param("record", 2, "times the excess", CALIBRATION),
    Param("company", 3, "rank", "own choice: two earlier spikes in the window hide nothing"),
    Param("edge", 0.9, "of the edge", f"1 is the edge (arXiv 2103.00065); {EDGES}: 0.97 and more before a swing"),
    Param("burst", 100, "times the median", f"{EDGES}: swings reached 30"),
)


@dataclass(frozen=True)
class Jumps:
    """Norms of gradients, as they were before they were clipped, against the points before each.

    Attributes:
        steps: ``(step,)`` int64, those to be judged; ``modules`` the second axis of all others.
        start: how many rows of the window come before them.
        all_norms, usable: ``(row, module)``, of the whole window.
        clipping: ``(step, 1)``, the factor by which all gradients were shortened.
        found: the norms that stand out.
    """

    steps: Steps
    modules: tuple[str, ...]
    start: int
    all_norms: Array
    usable: Mask
    clipping: Array
    found: Spikes

    @property
    def norm(self) -> Array:
        """``(step, module)``."""
        return self.all_norms[self.start :]

    @property
    def times(self) -> Array:
        """The norm over the median of the points before it, ``(step, module)``; NaN where that is not known."""
        return self.norm / np.exp(self.found.median)


def jumps(window: Window, p: Mapping[str, float]) -> Jumps:
    """Norms that are ``times`` the median of their window, ``sigmas`` above it, and ``record`` times as far as others.

    Args:
        window: with the first two of `NEEDS`, and 100 points of lookback.
        p: `PARAMS`.
    """
    block = window["grad_norm.norm"]
    start = int(np.searchsorted(block.steps, window.first))
    factors = clipping(window, block.steps)
    norms = block["grad_norm.norm"] / factors
    usable = block.has("grad_norm.norm") & (norms > 0)
    found = spikes(np.log(norms), usable, start, p, floor=float(np.log(p["times"])))
    return Jumps(block.steps[start:], block.modules, start, norms, usable, factors[start:], found)


def clipping(window: Window, steps: Steps) -> Array:
    """The factor by which clipping shortened all gradients, ``(step, 1)``; 1 where it did not, or made them 0."""
    factor, has = exactly(window["clip.coefficient"], steps, ("",))
    return np.where(has & (factor > 0), factor, 1.0)


def swings(window: Window, jumped: Jumps, p: Mapping[str, float]) -> tuple[Mask, Array]:
    """Jumps of a training that is at its edge of stability: no batch is to blame, for there is only one.

    The ratio to the edge was ``edge`` or more when it was measured last, every step trains on the same batch, the jump
    is below ``burst``, and the learning rate had not just been raised.

    Args:
        window: with `NEEDS`, and 100 points of lookback.
        jumped: what `jumps` gives.
        p: `PARAMS`.

    Returns:
        ``(step, module)`` which of the jumps, and ``(step, 1)`` the ratio to the edge as it was known then.
    """
    steps = jumped.steps
    ratio, known = latest(window[RATIO], steps, ("",))
    near = known & (ratio >= p["edge"])
    mask = jumped.found.mask & near & (jumped.times < p["burst"])
    if mask.any():
        mask &= whole_data(window, steps) & of_step(window, steps) & np.isnan(raised(window, steps, mask))
    return mask, ratio
