"""Adam's epsilon is as large as the gradients, and takes their updates away.

What it means:
    Adam divides by the root of the second moment plus epsilon. Where gradients have become so small that epsilon is a
    tenth of that root and more, updates are smaller than the learning rate says, down to nothing, and raising the
    learning rate hardly helps. It comes with size: the larger the model and what goes into its last normalisation, the
    smaller the gradients.

How it is decided:
    Epsilon over the root mean square of the remembered gradients is above 0.1 in at least a tenth of the parameters
    (critical: above 1), for 3 looks, while the rows of the loss still teach: (1 − accuracy) + (1 − mean largest
    probability) is at least 0.1. Parameters whose gradients are below 1e-5 of the median parameter's are left out: they
    are rounding noise, as of a bias in front of a normalisation. Trainings whose loss is no classification are not
    judged.

What to do:
    A smaller epsilon: 1e-15 in float32. Look at norm_layer.rms of the last normalisation: if it grows, cure that.

When it is wrong:
    A large epsilon may be meant, as a way between Adam and SGD. Parameters that are hardly used (rare rows of an
    embedding, experts nobody is sent to) have small gradients by nature, though rarely a tenth of all parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from monitor.metric import Array, Mask
from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._series import exactly, teaching

PAPER = "Wortsman et al. 2023 (arXiv 2309.14322) sec. 3.4"


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Looks at which too many parameters are throttled."""
    block = window["eps_ratio.ratio"]
    value, has = block["eps_ratio.ratio"], block.has("eps_ratio.ratio")
    size, sized = exactly(window["eps_ratio.grad_rms"], block.steps, block.modules)
    has = has & ~np.isnan(value) & ~_noise(size, sized, p["noise"])
    count = has.sum(axis=1)
    share, heavy = (
        np.where(count > 0, (has & (value > limit)).sum(axis=1) / np.maximum(count, 1), np.nan)[:, None]
        for limit in (p["limit"], p["critical"])
    )
    losses = window["train_accuracy.top1_mass"].modules[:1]
    left = teaching(window, block.steps, losses) if losses else np.zeros(share.shape)
    judged = (count > 0)[:, None] & (left >= p["teaching"])
    mask = judged & (share >= p["share"])
    worst = np.max(np.where(has, value, -np.inf), axis=1, initial=-np.inf)[:, None]
    yield Hits(block.steps, ("",), mask, judged, share, p["share"], {"largest": worst}, critical=heavy >= p["share"])


def _noise(size: Array, has: Mask, part: float) -> Mask:
    """Parameters whose gradients are less than a ``part`` of the median parameter's, ``(step, module)``."""
    known = has & (size > 0)
    if not known.any():
        return known
    ranked = np.sort(np.where(known, size, np.inf), axis=1)
    median = np.take_along_axis(ranked, (known.sum(axis=1, keepdims=True) - 1) // 2, axis=1)
    return known & (size < part * median)


RULE = Rule(
    id="update_throttled_by_eps",
    title="Updates throttled by epsilon",
    severity="warning",
    site="update",
    message="Epsilon is above a tenth of the root of Adam's second moment in {value:.0%} of the parameters.",
    refute="a smaller epsilon changes nothing in the updates' size",
    remedies=(Remedy("give the optimizer a smaller eps, such as 1e-15"), Remedy("lower the learning rate")),
    params=(
        Param("limit", 0.1, "1", f"own choice: an update is then 9 % smaller; {PAPER} for the effect"),
        Param("critical", 1, "1", f"{PAPER}: updates collapse when gradients reach epsilon"),
        Param("share", 0.1, "fraction", "own choice: of the parameters that were looked at"),
        Param(
            "noise", 1e-5, "of the median", "digits through two convolutions with biases and batch norms: up to 3e-6"
        ),
        Param("teaching", 0.1, "1", "own choice: below it gradients vanish because everything is learnt"),
    ),
    needs=("eps_ratio.ratio", "eps_ratio.grad_rms", "train_accuracy.accuracy", "train_accuracy.top1_mass"),
    check=check,
    lookback=1,
    hold=3,
    doc=__doc__ or "",
)
