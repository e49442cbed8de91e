"""The loss jumped far above what it had been.

What it means:
    For one or a few steps the loss stood far outside its own recent range. One spike is often harmless; it still says
    that some batch or some update was unlike the others, and in large models spikes are how divergence begins.

How it is decided:
    A loss is compared with the 100 points before it, never with itself. It must exceed their median by 6 robust
    standard deviations (1.4826 · MAD), on the linear scale and, where all are positive, on the logarithmic one; by
    three times what the largest of them exceeds it by; by a tenth of the median; and, where a classification loss was
    seen, by a tenth of a nat. So noise, heavy tails of small batches, smooth ripples and wiggles at 1e-8 are no
    spikes. Other losses of which most are exactly 0 are not judged: they have no scale.

What to do:
    See what else happened in the same incident: an input jump names the batch, a gradient spike names the tensor. If
    the evidence has a learning rate factor, the learning rate had been raised so many times within 10 steps: undo that,
    or raise it slowly. If there is nothing of the kind, look at the batch, then at the learning rate.

When it is wrong:
    A change of the data or of the loss on purpose (a curriculum, a term switched on) is one spike at the switch. A
    spike is missed if the loss was still falling steeply, or if a third of it stands in the 100 points before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._series import CALIBRATION, latest, raised, spikes


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Losses that stand out from the points before them."""
    block = window["loss.value"]
    loss, has = block["loss.value"], block.has("loss.value")
    start = int(np.searchsorted(block.steps, window.first))
    found = spikes(loss, has, start, p)
    mask = found.mask
    if mask.any():
        logarithms = spikes(np.log(loss), has & (loss > 0), start, p)
        mask = mask & ((logarithms.z >= p["sigmas"]) | (logarithms.count < found.count))
        excess = loss[start:] - found.median
        mask &= excess >= p["rise"] * np.abs(found.median)
        accuracy = window["train_accuracy.accuracy"]
        classifies = latest(accuracy, block.steps[start:], accuracy.modules)[1].any(axis=1, keepdims=True)
        # a loss that is exactly 0 most of the time (a margin) has no scale, unless its unit is the nat
        mask &= np.where(classifies, excess >= p["nats"], np.isfinite(found.z))
    evidence = {"loss": loss[start:], "median": found.median}
    if mask.any():
        evidence["learning_rate_factor"] = raised(window, block.steps[start:], mask)
    yield Hits(block.steps[start:], block.modules, mask, found.known, found.z, p["sigmas"], evidence)


RULE = Rule(
    id="loss_spike",
    title="Loss spike",
    severity="warning",
    site="loss",
    message="The loss jumped to {loss:.4g}, {value:.3g} robust standard deviations above its median of {median:.4g}.",
    refute="the step began a new phase of the script: other data, another loss, another learning rate",
    remedies=(
        Remedy("find the batch of the peak step, and skip or repair it"),
        Remedy("if the learning rate had just been raised, undo that; else clip the gradient norm, or lower it"),
        Remedy("lower Adam's beta2, so that one large gradient is forgotten sooner"),
    ),
    params=(
        Param("sigmas", 6, "robust σ", "OLMo-core's spike detector (mean + 6 σ over 128 points), with median and MAD"),
        Param("window", 100, "points", "as loss_z and grad_norm_z"),
        Param("minimum", 20, "points", "SPAM (arXiv 2501.06842): no decision in the first 20 steps"),
        Param("record", 3, "times the largest excess", CALIBRATION),
        Param("company", 1, "rank", "the largest of the window"),
        Param("rise", 0.1, "fraction of the median", "own choice: less is seen in no curve"),
        Param("nats", 0.1, "nats", CALIBRATION),
    ),
    needs=("loss.value", "train_accuracy.accuracy", "learning_rate.lr"),
    check=check,
    lookback=100,
    doc=__doc__ or "",
)
