"""The gain of a normalisation layer is going to zero.

What it means:
    What a normalisation layer multiplies by has shrunk to a tenth and less in most features and goes on shrinking, so
    that the layers behind it are given almost nothing, and what is before it gets gradients that are as small.

How it is decided:
    The median magnitude of the gain is below 0.1, and at most half of what it was at some time in the last 40 looks
    (2,000 steps, once the early looks are past), for 3 looks.

What to do:
    Take the gains out of weight decay, as is usual for vectors. A lower learning rate; if the gain of the last
    normalisation falls because the stream has exploded, cure that first (see residual_explosion).

When it is wrong:
    Language models let the gains of some layers become small without harm, and layers that begin with a gain of 0 pass
    nothing at first by intent. A gain that shrinks more slowly than by half in 2,000 steps is not found.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._series import rolling_max


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Layers whose median gain is small and still falling."""
    block = window["norm_layer.gain_median"]
    value, has = block["norm_layer.gain_median"], block.has("norm_layer.gain_median")
    size = int(p["window"])
    padded = np.full((len(value) + size, value.shape[1]), -np.inf)
    padded[size:] = np.where(has & np.isfinite(value), value, -np.inf)
    largest = rolling_max(padded, size + 1)
    judged = has & np.isfinite(value)
    mask = judged & (value < p["limit"]) & (value <= p["fall"] * largest)
    yield Hits(block.steps, block.modules, mask, judged, value, p["limit"], {"largest": largest})


RULE = Rule(
    id="norm_gain_collapse",
    title="Normalisation gain collapse",
    severity="warning",
    site="activation",
    message="The gain of {module} has fallen from {largest:.3g} to {value:.3g} (median magnitude).",
    refute="the loss falls as fast as without this layer's gain, or the gain was meant to be small",
    remedies=(
        Remedy("take gains and biases out of weight decay"),
        Remedy("lower the learning rate"),
    ),
    params=(
        Param("limit", 0.1, "1", "own choice, not calibrated; 27 trainings of a small transformer stayed above 0.1"),
        Param("fall", 0.5, "fraction", "own choice: a gain that is small and does not change is left alone"),
        Param("window", 40, "points", "own choice: 2,000 steps at the default cadence"),
    ),
    needs=("norm_layer.gain_median",),
    check=check,
    lookback=40,
    hold=3,
    experimental=True,
    doc=__doc__ or "",
)
