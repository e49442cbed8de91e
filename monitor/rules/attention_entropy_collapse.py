"""An attention head looks at one key only, because its logits have grown too large to let it look at others.

What it means:
    The rows of this head are one-hot by the size of its logits. The gradient through its softmax is almost zero, so the
    head can hardly change its mind any more, and where it does it flips. This goes before many divergences of
    transformers.

How it is decided:
    The mean entropy of the sampled rows of a head is below 2 % of what it could be, and the largest logit read
    of the same head is above 50, for 3 points. Both are needed: sharp heads alone are healthy, be they ever so many.

What to do:
    As for attention logits that are too large: qk-norm, a lower learning rate, a longer warm-up, weight decay on the
    projections of queries and keys.

When it is wrong:
    Heads that copy or look at the token before may be this sharp for good reason, with logits a little above 50, in a
    training that goes well. The sample is some 16 rows a call, so a head that is sharp on most rows may be taken for
    one that is sharp on all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._series import exactly


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Heads that are sharp because their logits are large."""
    block = window["attn_entropy.normalised"]
    start = int(np.searchsorted(block.steps, window.first))
    steps, modules = block.steps[start:], block.modules
    entropy, has = block["attn_entropy.normalised"][start:], block.has("attn_entropy.normalised")[start:]
    largest, known = exactly(window["attn_logit_max.found"], steps, modules)
    has = has & known & ~np.isnan(entropy) & ~np.isnan(largest)
    mask = has & (entropy < p["entropy"]) & (largest > p["logit"])
    yield Hits(steps, modules, mask, has, entropy, p["entropy"], {"logit": largest})


RULE = Rule(
    id="attention_entropy_collapse",
    title="Attention entropy collapse",
    severity="warning",
    site="attention",
    message="The rows of {module} have {value:.2%} of their possible entropy, with logits of {logit:.4g}.",
    refute="the head is known to copy, its logits do not grow any more, and the loss falls",
    remedies=(
        Remedy("normalise queries and keys per head (qk-norm) before their product", "monitor.remedies.QKNorm"),
        Remedy("lower the learning rate or lengthen the warm-up"),
        Remedy("use weight decay on the query and key projections"),
    ),
    params=(
        Param(
            "entropy",
            0.02,
            "of ln(keys)",
            "own choice: own sweep of learning rates 0.0004 where it ruins, 0.23 at the best",
        ),
        Param("logit", 50, "nats", "own choice: the same sweep 12,000 where it ruins, 14 at the best"),
    ),
    needs=("attn_entropy.normalised", "attn_logit_max.found"),
    check=check,
    lookback=1,
    hold=3,
    experimental=True,
    doc=__doc__ or "",
)
