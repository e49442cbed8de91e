"""The logits of an attention head have grown beyond what training survives.

What it means:
    Queries and keys have become so long that the softmax of this head is a hard choice: its rows are one-hot, almost
    no gradient passes through it, and small changes of the weights flip whole rows. The loss need not become NaN: it
    often just stays bad, so that the loss alone does not show it.

How it is decided:
    The largest logit of a head is at least 1,000 for 3 points (critical: 10,000). It is taken from the bound that
    the saved log-sum-exp gives every fifth step; at 1,000 that is about 1 % above the maximum itself at most. Where
    there is no bound, the largest logit of the rows that were read is taken, which is none too large: sampled rows
    (dropout or values of another size on a CPU, activation checkpointing), or all (attention written by hand).

What to do:
    Normalise queries and keys per head (qk-norm: a LayerNorm or RMSNorm in front of the product); or a lower learning
    rate, a longer warm-up, a soft cap on the logits.

When it is wrong:
    An additive bias of that size (not a mask) counts as a logit. Sampled rows may miss the largest logit, so without
    the bound growth may be found late. Growth below 1,000 is not found, however steady it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._attention import BOUND, READ, largest_logits
from monitor.rules._series import latest

PAPER = "Wortsman et al. 2023 (arXiv 2309.14322) sec. 3.1"


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Heads whose largest logit is above the limit."""
    logits = largest_logits(window)
    steps, modules, value = logits.steps, logits.modules, logits.value
    mask = logits.has & (value >= p["limit"])
    evidence = {"norm_bound": np.full(value.shape, np.nan), "alignment": np.full(value.shape, np.nan)}
    if mask.any():
        evidence["norm_bound"] = latest(window["qk_norm_bound.bound"], steps, modules)[0]
        evidence["alignment"] = latest(window["qk_norm_bound.alignment"], steps, modules)[0]
    yield Hits(steps, modules, mask, logits.has, value, p["limit"], evidence, critical=value >= p["critical"])


RULE = Rule(
    id="attention_logit_growth",
    title="Attention logits too large",
    severity="warning",
    site="attention",
    message="The attention logits of {module} reach {value:.4g}.",
    refute="an additive bias of this size is part of the model, or the run trains on without loss at this level",
    remedies=(
        Remedy("normalise queries and keys per head (qk-norm) before their product", "monitor.remedies.QKNorm"),
        Remedy("lower the learning rate or lengthen the warm-up"),
        Remedy("cap the logits softly, or clip query and key weights when the bound exceeds a limit"),
    ),
    params=(
        Param("limit", 1e3, "nats", f"{PAPER}: forcing logits of 1e3 already costs"),
        Param("critical", 1e4, "nats", f"{PAPER}: every run above it diverged"),
    ),
    needs=(BOUND, READ, "qk_norm_bound.bound", "qk_norm_bound.alignment"),
    check=check,
    lookback=1,
    hold=3,
    doc=__doc__ or "",
)
