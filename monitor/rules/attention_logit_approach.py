"""The logits of an attention head grow so steadily that they will soon be too large.

What it means:
    Queries and keys of this head become longer at a constant rate. If nothing stops them, its softmax becomes a hard
    choice and training suffers (see attention_logit_growth). The learning rate can still be lowered in time.

How it is decided:
    The largest logit of a head is between 100 and 1,000. A line through its logarithm over the last 20 recorded
    points (about 100 steps of the bound, 200 where there is none) rises and reaches 10,000 before the run is twice as
    long as it is now; for 3 points. All 20 points must be there. A head that is sharp and stays so does not rise.

What to do:
    As for attention logits that are too large: qk-norm, a lower learning rate, a longer warm-up.

When it is wrong:
    Growth may stop by itself, above all when the learning rate is about to fall. Logits that pass from below 100 to
    above 1,000 within a few points are found by attention_logit_growth alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from monitor.metric import Array, Block, Mask
from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._attention import BOUND, READ, largest_logits
from monitor.rules.attention_logit_growth import PAPER

POINTS = 20


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Heads whose largest logit is on its way to the critical one."""
    logits = largest_logits(window)
    steps, modules, value = logits.steps, logits.modules, logits.value
    near = logits.has & (value >= p["logit"]) & (value < p["limit"])
    left = np.full(value.shape, np.nan)
    for ref, own in ((BOUND, logits.bounded), (READ, logits.read)):
        for j in np.flatnonzero((near & own).any(axis=0)):
            rows = np.flatnonzero(near[:, j] & own[:, j])
            left[rows, j] = _left(window[ref], modules[j], steps[rows], p["critical"])
    mask = near & (left <= steps[:, None])
    yield Hits(steps, modules, mask, logits.has, value, p["logit"], {"steps_left": left})


def _left(block: Block, module: str, at: npt.NDArray[np.int64], critical: float) -> Array:
    """Steps until the line through the logarithms of the last `POINTS` rows reaches ``critical``; inf if it never does.

    Of each step in ``at``, a row of ``block``; NaN where one of the points is missing.
    """
    (name,) = block.names
    column = block.modules.index(module)
    has: Mask = block.has(name)[:, column]
    with np.errstate(all="ignore"):
        y = np.where(has, np.log(block[name][:, column]), np.nan)
    left = np.full(len(at), np.nan)
    row = np.searchsorted(block.steps, at)
    full = row >= POINTS - 1
    rows = row[full, None] + np.arange(1 - POINTS, 1)
    x = block.steps[rows] - block.steps[row[full], None].astype(np.float64)
    points, middle = y[rows], x.mean(axis=1, keepdims=True)
    slope = ((x - middle) * points).sum(axis=1) / ((x - middle) ** 2).sum(axis=1)
    now = points.mean(axis=1) - slope * middle[:, 0]
    with np.errstate(all="ignore"):
        left[full] = np.where(slope > 0, (np.log(critical) - now) / slope, np.where(np.isnan(slope), np.nan, np.inf))
    return left


RULE = Rule(
    id="attention_logit_approach",
    title="Attention logits growing fast",
    severity="warning",
    site="attention",
    message="The attention logits of {module} are {value:.4g} and reach 10,000 in {steps_left:.0f} steps at this rate.",
    refute="the logits stop growing before they reach 1,000",
    remedies=(
        Remedy("normalise queries and keys per head (qk-norm) before their product", "monitor.remedies.QKNorm"),
        Remedy("lower the learning rate or lengthen the warm-up"),
    ),
    params=(
        Param("logit", 100, "nats", "own choice: own sweeps of learning rates stay below 60 where they train well"),
        Param("limit", 1e3, "nats", f"{PAPER}: from there on attention_logit_growth speaks"),
        Param("critical", 1e4, "nats", f"{PAPER}: every run above it diverged"),
    ),
    needs=(BOUND, READ),
    check=check,
    lookback=POINTS,
    hold=3,
    experimental=True,
    doc=__doc__ or "",
)
