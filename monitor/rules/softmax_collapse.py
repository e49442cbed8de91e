"""The softmax has collapsed: many training rows have a loss of exactly zero, and the others almost.

What it means:
    The logits have grown so far apart that 1 + (everything else) rounds to 1 in the precision of the loss. Such a
    row's loss is exactly 0 and its correct class gets no gradient; learning stops there. In classifiers trained
    beyond 100 % accuracy without weight decay this is why generalisation never comes (no grokking); and with a small
    Adam epsilon the second moment decays meanwhile, so that the next gradient that is not zero makes a huge step.

How it is decided:
    The share of training rows whose loss is exactly 0, as the loss kernel gave it, is at least 5 % (critical: 50 %)
    for 3 points, and what the rows still teach, (1 − accuracy) + (1 − mean largest probability), is at most 2^-18 =
    4e-6 (64 roundings of float32). Batches of fewer than 128 rows are pooled with up to 31 before them, so that one
    easy batch is no collapse. Two other definitions are shown beside it: rows whose remaining mass is below the unit
    roundoff (exact_share), and the median distance from there in nats (headroom).

What to do:
    If the task is learned, stop. Otherwise keep the logits from growing for nothing: StableMax cross-entropy, the
    orthogonal gradient, weight decay, label smoothing or a z-loss; or compute the loss in float64, which postpones
    it. Raise a tiny Adam epsilon (1e-10 and more), so that the end of the collapse is not an explosion.

When it is wrong:
    A classifier that has simply converged on separable data ends here too and takes no harm from it: there is nothing
    left to learn. The finding then says that further training is in vain, not that the model is bad. Zero losses
    alone are healthy: large learning rates on easy data give them to half of the rows while the other half still
    teaches. In half precision a collapse is found only when nearly all rows are zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._series import latest, teaching

PAPER = "Prieto et al. 2025 (arXiv 2501.04697)"


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Share of rows with zero loss, pooled over small batches."""
    block = window["loss_zero_frac.frac"]
    start = int(np.searchsorted(block.steps, window.first))
    steps, modules, frac = block.steps, block.modules, block["loss_zero_frac.frac"]
    rows, counted = latest(window["loss_zero_frac.rows"], steps, modules)
    has = block.has("loss_zero_frac.frac") & np.isfinite(frac) & counted & (rows > 0) & np.isfinite(rows)
    size = np.rint(np.where(has, rows, 0.0))
    # counts are whole numbers, so their running sums are exact wherever they begin
    zeros = np.rint(np.where(has, frac, 0.0) * size)
    total, zero = (np.cumsum(np.pad(a, ((1, 0), (0, 0))), axis=0) for a in (size, zeros))
    back = np.clip(np.ceil(p["rows"] / np.maximum(size, 1)), 1, p["pool"]).astype(np.int64)
    end = np.arange(1, len(steps) + 1)[:, None]
    begin, each = np.maximum(end - back, 0), np.arange(len(modules))[None, :]
    share = ((zero[end, each] - zero[begin, each]) / (total[end, each] - total[begin, each]))[start:]
    has, evidence = has[start:], {}
    broken = has & (share >= p["share"])
    if broken.any():
        teaches = teaching(window, steps, modules)
        signal = np.full(share.shape, np.nan)
        for row, i in np.argwhere(broken):
            pool = slice(begin[start + row, i], start + row + 1)
            signal[row, i] = np.nansum(teaches[pool, i] * size[pool, i]) / size[pool, i].sum()
        broken &= signal <= p["signal"]
        evidence = {"signal": signal}
        shown = {"exact_share": "softmax_collapse_frac.frac", "headroom": "sc_headroom.q50"}
        shown["accuracy"] = "train_accuracy.accuracy"
        evidence |= {name: latest(window[ref], steps[start:], modules)[0] for name, ref in shown.items()}
    yield Hits(steps[start:], modules, broken, has, share, p["share"], evidence, critical=share >= p["critical"])


RULE = Rule(
    id="softmax_collapse",
    title="Softmax collapse",
    severity="warning",
    site="logits",
    message="{value:.1%} of the training rows have a loss of exactly zero: they teach nothing any more.",
    refute="the task is learned and validation has long been perfect: then there is nothing left to lose",
    remedies=(
        Remedy("train with StableMax instead of softmax", "monitor.remedies.StableMaxCrossEntropy"),
        Remedy("take the part of the gradient along the weights away", "monitor.remedies.OrthogonalGradient"),
        Remedy("use weight decay, label smoothing or a z-loss; stop if the task is learned"),
        Remedy("compute the loss in float64, and raise Adam's epsilon to 1e-10 or more"),
    ),
    params=(
        Param("share", 0.05, "fraction", "own calibration: leads the explosion of the collapse recipe by 400 steps"),
        Param("critical", 0.5, "fraction", f"{PAPER}, Fig. 4"),
        Param(
            "signal",
            2.0**-18,
            "fraction",
            "64 roundings of float32; healthy trainings with zero losses stay above 2^-12",
        ),
        Param("rows", 128, "rows", "own choice: standard error of a share of 5 % below 2 points"),
        Param("pool", 32, "points", "own choice: bounds the delay in small batches"),
    ),
    needs=(
        "loss_zero_frac.frac",
        "loss_zero_frac.rows",
        "softmax_collapse_frac.frac",
        "sc_headroom.q50",
        "train_accuracy.accuracy",
        "train_accuracy.top1_mass",
    ),
    check=check,
    lookback=32,
    hold=3,
    doc=__doc__ or "",
)
