"""Two experts of a router are the same.

What it means:
    Two experts have nearly the same weights, so that it does not matter which of them a token is sent to: the mixture
    pays for one more expert than it has. Experts that begin apart do not come together by training; the usual causes
    are a common seed or copies of one layer that were never pushed apart.

How it is decided:
    The largest cosine between the weights of two experts, over the same sample of at least a thousand entries, is above
    0.9 at 3 looks in a row, which are 200 steps, after the first 500 steps.

What to do:
    If the experts began as copies of a dense layer, add noise to them or initialise part of each anew. Otherwise look
    for the seed that they share. Dropping one of two equal experts loses nothing.

When it is wrong:
    Experts copied from one layer begin at 1 by design and move apart slowly under the small learning rates of
    fine-tuning; they may use their small differences well. That is why this is information and no warning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._series import latest


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Routers with two experts that are alike."""
    block = window["expert_similarity.largest"]
    start = int(np.searchsorted(block.steps, window.first))
    steps, modules = block.steps[start:], block.modules
    value = block["expert_similarity.largest"][start:]
    has = block.has("expert_similarity.largest")[start:] & ~np.isnan(value) & (steps >= p["settle"])[:, None]
    evidence = {"mean": latest(window["expert_similarity.mean"], steps, modules)[0]}
    yield Hits(steps, modules, has & (value > p["cosine"]), has, value, p["cosine"], evidence)


RULE = Rule(
    id="expert_redundancy",
    title="Two experts alike",
    severity="info",
    site="router",
    message="Two experts of {module} have a cosine of {value:.3f}; two of them taken at random {mean:.3f}.",
    refute="the experts began as copies on purpose and their cosine falls",
    remedies=(
        Remedy("initialise the experts apart: their own seeds, or noise on copies of a dense layer"),
        Remedy("drop one of the two, and send its tokens to the other"),
    ),
    params=(
        Param("cosine", 0.9, "1", "own choice; in 30 MoE trainings from scratch the largest ever was 0.1"),
        Param("settle", 500, "steps", "own choice: copies need time to move apart"),
    ),
    needs=("expert_similarity.largest", "expert_similarity.mean"),
    check=check,
    lookback=1,
    hold=3,
    release=3,
    doc=__doc__ or "",
)
