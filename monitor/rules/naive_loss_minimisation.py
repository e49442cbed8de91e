"""The loss falls because the logits grow, not because anything more is learned.

What it means:
    All training rows are right, and the gradient points along the weights themselves: a step makes the logits larger
    and leaves their direction as it is. The loss still falls, so it looks like progress, but nothing that generalises
    better is found in this way; it ends when the softmax collapses (softmax_collapse). In networks that have memorised
    it is what keeps them from generalising.

How it is decided:
    Training accuracy at least 99.9 %, the cosine of the descent direction with the weights (nlm_cos, of the output
    layer or of the whole, whichever is larger) at least 0.8, and over the last 50 points (250 steps at the usual
    cadence) the rate of naive loss minimisation (nlm_rate) has fallen at least threefold while the z-score of the
    target (zscore_target), which no growth of the logits changes, has changed by at most 2 % for every factor of e;
    for 10 points. It is latched: when the softmax collapses the cosine falls to about 0, which cures nothing and is not
    counted. Training rows that are wrong again end it, and a z-score that moves while the loss falls.

What to do:
    Stop if the task is learned. If other data are not understood yet, take the part of the gradient along the weights
    away (orthogonal gradient), add weight decay, or train with StableMax instead of softmax.

When it is wrong:
    A classifier that has simply converged on separable data ends here too, and takes no harm from it: that is why this
    is information and no warning. The cosine alone says nothing: it is above 0.9 through all of a training with strong
    weight decay that generalises, whose z-score moves all the while. With two classes the z-score is always 1 or -1:
    such runs are not judged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from monitor.metric import Array
from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._series import Steps, exactly, latest

PAPER = "Prieto et al. 2025 (arXiv 2501.04697)"
CALIBRATED = (
    "calibrated on addition modulo 41 and 59: at least 0.025 per factor of e until two runs that generalise had done "
    "so, below 0.02 in five that had not after 1,200 to 6,000 steps"
)
#: Largest z-score that two classes can have, and rounding.
_TWO_CLASSES = 1.001


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Everything right, gradient along the weights, z-score flat while scaling has paid off."""
    block = window["zscore_target.mean"]
    steps, modules = block.steps, block.modules
    start, back = int(np.searchsorted(steps, window.first)), int(p["window"])
    z, has = block["zscore_target.mean"], block.has("zscore_target.mean")
    rate, paid = exactly(window["nlm_rate.rate"], steps, modules)
    now, then = slice(max(start, back), None), slice(max(start, back) - back, max(len(steps) - back, 0))
    judged, value = np.zeros(z.shape, dtype=np.bool_), np.full(z.shape, np.nan)
    mask, change = judged.copy(), value.copy()
    if len(steps[now]):
        value[now] = _alignment(window, steps[now])[:, None]
        known = has[now] & has[then] & paid[now] & paid[then] & (z[now] > _TWO_CLASSES) & np.isfinite(value[now])
        fallen = rate[then] / rate[now]
        folds = np.log(np.where((rate[now] > 0) & np.isfinite(fallen), fallen, np.nan))  # negative: growth does not pay
        change[now] = np.abs(z[now] / z[then] - 1) / folds
        accuracy, seen = latest(window["train_accuracy.accuracy"], steps[now], modules)
        right, falls = accuracy >= p["accuracy"], folds >= np.log(p["fall"])
        mask[now] = right & falls & (value[now] >= p["alignment"]) & (change[now] <= p["flat"])
        # of everything right, a z-score that stands still and no gradient along the weights nothing is said: so it is
        # once the softmax has collapsed
        judged[now] = known & seen & (~right | mask[now] | (falls & (change[now] > p["flat"])))
    evidence = {"zscore": z[start:], "rate": rate[start:], "change": change[start:]}
    yield Hits(steps[start:], modules, mask[start:], judged[start:], value[start:], p["alignment"], evidence)


def _alignment(window: Window, steps: Steps) -> Array:
    """Cosine of the descent direction with the weights, ``(step,)``, as last recorded; NaN without.

    The larger of that of the output layer, taken to be the last matrix of the model, and that of the whole model.
    """
    layers = window["nlm_cos.cos"]
    matrices = (q["name"] for q in reversed(window.facts.get("parameters", ())) if len(q["shape"]) > 1)
    output = next((name for name in matrices if name in layers.modules), layers.modules[-1] if layers.modules else "")
    whole, last = latest(window["nlm_cos.total"], steps, ("",))[0], latest(layers, steps, (output,))[0]
    return np.fmax(whole, last)[:, 0]


RULE = Rule(
    id="naive_loss_minimisation",
    title="Naive loss minimisation",
    severity="info",
    site="logits",
    message="The loss falls because the logits grow: the descent direction has a cosine of {value:.2f} with the "
    "weights, and the z-score of the target stays at {zscore:.3g}.",
    refute="the held-out accuracy rises at the same time",
    remedies=(
        Remedy("stop if the task is learned"),
        Remedy("take the part of the gradient along the weights away", "monitor.remedies.OrthogonalGradient"),
        Remedy("add weight decay"),
        Remedy("train with StableMax instead of softmax", "monitor.remedies.StableMaxCrossEntropy"),
    ),
    params=(
        Param("alignment", 0.8, "cosine", f"own choice below the 0.9 of {PAPER}, Fig. 5"),
        Param("accuracy", 0.999, "fraction", PAPER),
        Param("fall", 3, "times", "own choice: what is much less says nothing about the direction"),
        Param("flat", 0.02, "per factor of e", CALIBRATED),
        Param("window", 50, "points", "own choice: 250 steps at the usual cadence"),
    ),
    needs=(
        "zscore_target.mean",
        "nlm_rate.rate",
        "nlm_cos.cos",
        "nlm_cos.total",
        "train_accuracy.accuracy",
    ),
    check=check,
    lookback=50,
    hold=10,
    doc=__doc__ or "",
)
