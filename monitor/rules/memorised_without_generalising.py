"""The training data are memorised, other data are not understood, and nothing is left that could change it.

What it means:
    Training accuracy is at its top, held-out accuracy far below, and learning has come to rest there. Either the
    softmax has collapsed: the rows' losses are exactly zero in the precision of the loss, so that there is no gradient
    that could turn what was memorised into something that generalises. Or no weight decay is set anywhere and the
    held-out accuracy has long stood still: then further steps mostly make the logits larger.

How it is decided:
    At every evaluation that the script logs: training accuracy at least 99 %, more than 0.3 above the held-out
    accuracy (see grokking_phase), and one of
      - at least 5 % of the training rows have a loss of exactly zero, and the rows teach at most 2^-18 (both as in
        softmax_collapse): at 5 evaluations in a row;
      - no parameter group has weight decay, the rows teach at most 2^-12, and the held-out accuracy lies no more than
        0.05 above the lowest of the last 20 evaluations, all of which had the gap as far as the last 480 training
        steps tell: at 5 evaluations in a row.
    The cosine of the descent direction with the weights (nlm_cos) is shown beside it: near 1, the steps only make the
    logits larger; near 0 after a collapse, they follow what few rows are left.

What to do:
    Give learning a direction again: take the part of the gradient along the weights away (orthogonal gradient), add
    weight decay, or train with StableMax instead of softmax. Each makes modular addition generalise where plain Adam
    memorises for ever, the first within a few hundred steps, the last only after tens of thousands. If none helps, the
    share of the task that is trained on is too small.

When it is wrong:
    Held-out data of another distribution, or with random labels, cannot be generalised to; the finding then says only
    that the rest of the training is in vain. Regularisation that is no weight decay of the optimizer (an L2 term in
    the loss, dropout) is not seen, and may still bring generalisation; so may an instability late in training.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from monitor.metric import Array, Mask
from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._series import ACCURACIES, POOL, Steps, accuracies, latest, teaching

_LOSS = ("cross_entropy",)
CHECKED = (
    "own choice; checked on addition modulo 41 and 113 (weight decay 0 and 1, orthogonal gradient, StableMax, a fifth "
    "of the pairs), XOR clusters and digits from 50, 200 and 1,000 rows: found in plain Adam without weight decay only"
)


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Memorised, and either collapsed or long without progress and without weight decay."""
    steps, names, train, held = accuracies(window)
    start = int(np.searchsorted(steps, window.first))
    gap = train - held
    memorised = (train >= p["train"]) & (gap > p["gap"])
    mask = np.zeros(memorised.shape, dtype=np.bool_)
    teaches = zero = np.full((len(steps), 1), np.nan)
    if memorised[start:].any():
        teaches = teaching(window, steps, _LOSS)
        zero, _ = latest(window["loss_zero_frac.frac"], steps, _LOSS)
        mask |= memorised & (zero >= p["share"]) & (teaches <= p["collapsed"])
        if _undecayed(window.facts):
            seen = window["train_accuracy.accuracy"].steps
            oldest = np.maximum(np.searchsorted(seen, steps, side="right") - 1 - int(p["points"]), 0)
            since = seen[oldest] if len(seen) else steps
            still = teaches[:, 0] <= p["signal"]
            for i in range(len(names)):
                mask[:, i] |= still & _stuck(steps, since, memorised[:, i], held[:, i], p, start)
    evidence = {"train": train, "held_out": held}
    evidence |= {"zero_losses": np.broadcast_to(zero, held.shape), "signal": np.broadcast_to(teaches, held.shape)}
    evidence["alignment"] = np.broadcast_to(latest(window["nlm_cos.total"], steps, ("",))[0], held.shape)
    yield Hits(
        steps[start:], names, mask[start:], np.isfinite(gap)[start:], gap[start:], p["gap"],
        {name: values[start:] for name, values in evidence.items()},
    )  # fmt: skip


def _stuck(steps: Steps, since: Steps, memorised: Mask, held: Array, p: Mapping[str, float], start: int) -> Mask:
    """Where the last ``long`` evaluations did not rise, and those ``since`` a step all had the gap."""
    found, long = np.zeros(len(held), dtype=np.bool_), int(p["long"])
    rows = np.flatnonzero(np.isfinite(held))
    for end in range(max(long, int(np.searchsorted(rows, start)) + 1), len(rows) + 1):
        last = rows[end - long : end]
        now = last[-1]
        found[now] = memorised[last[steps[last] >= since[now]]].all() and held[now] <= held[last].min() + p["rise"]
    return found


def _undecayed(facts: Mapping[str, Any]) -> bool:
    """True if it is known that no group of any optimizer has weight decay."""
    groups = [group for optimizer in facts.get("optimizers", ()) for group in optimizer["groups"]]
    return bool(groups) and all(group.get("weight_decay") == 0 for group in groups)


RULE = Rule(
    id="memorised_without_generalising",
    title="Memorised without generalising",
    severity="warning",
    site="loss",
    message="{train:.1%} of the training rows are right, {module} stays at {held_out:.1%}, and learning has stopped "
    "because the rows teach only {signal:.1e} any more: {zero_losses:.0%} of them have a loss of exactly zero.",
    refute="the held-out data are not of the distribution that is trained on, or a regularisation that is no weight "
    "decay of the optimizer is at work",
    remedies=(
        Remedy("take the part of the gradient along the weights away", "monitor.remedies.OrthogonalGradient"),
        Remedy("add weight decay"),
        Remedy("train with StableMax instead of softmax", "monitor.remedies.StableMaxCrossEntropy"),
        Remedy("train on a larger share of the task"),
    ),
    params=(
        Param("gap", 0.3, "fraction", "own choice: overfitted but useful classifiers stay below it"),
        Param("train", 0.99, "fraction", "the usual mark of memorisation, e.g. Power et al. 2022 (arXiv 2201.02177)"),
        Param("share", 0.05, "fraction", "as in softmax_collapse"),
        Param("collapsed", 2.0**-18, "fraction", "as in softmax_collapse"),
        Param("signal", 2.0**-12, "fraction", "as in softmax_collapse_approach"),
        Param("long", 20, "evaluations", CHECKED),
        Param("points", 480, "points", "own choice: bounds what is remembered of the training accuracy"),
        Param("rise", 0.05, "fraction", CHECKED),
    ),
    needs=(*ACCURACIES, "train_accuracy.top1_mass", "loss_zero_frac.frac", "nlm_cos.total"),
    check=check,
    lookback=480 + POOL,
    hold=5,
    release=3,
    doc=__doc__ or "",
)  # fmt: skip
