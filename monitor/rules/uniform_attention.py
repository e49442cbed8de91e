"""An attention head looks at all keys alike, long after the start, while the loss stands still.

What it means:
    The rows of this head are uniform: it averages what it sees and picks nothing out. So is every head at first, and
    it learns where to look while the loss falls. A head that is uniform when the loss has stopped falling does
    nothing that a mean would not do: its queries and keys are dead, or nothing in the task needs them.

How it is decided:
    The mean entropy of the rows of a head is at least 99 % of what it could be, for 20 points (about 200 steps), at
    each of which the median loss of the last 200 recorded steps is less than 2 % below that of the 200 before.

What to do:
    See whether the heads matter: if the loss is as low as it should be, the model has more of them than it needs. If
    it is not, they died early: lower the learning rate or lengthen the warm-up, look for a norm in front of them whose
    gains went to 0, or begin with larger query and key weights.

When it is wrong:
    A task that needs no attention leaves all heads uniform in a training that went well, so this is information and no
    warning. With a loss that falls slowly for very long, heads may still be about to learn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from monitor.metric import Block, Mask
from monitor.rule import Hits, Param, Remedy, Rule, Window

WINDOW = 200


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Heads that are uniform where the loss is flat."""
    block, loss = window["attn_entropy.normalised"], window["loss.value"]
    start = int(np.searchsorted(block.steps, window.first))
    steps, entropy = block.steps[start:], block["attn_entropy.normalised"][start:]
    row = np.searchsorted(loss.steps, steps, side="right") - 1
    has = block.has("attn_entropy.normalised")[start:] & ~np.isnan(entropy) & (row >= 2 * WINDOW - 1)[:, None]
    mask = has & (entropy >= p["entropy"])
    some = np.flatnonzero(mask.any(axis=1))
    mask[some] &= _flat(loss, row[some], p["fall"])[:, None]
    yield Hits(steps, block.modules, mask, has, entropy, p["entropy"])


def _flat(loss: Block, rows: npt.NDArray[np.int64], fall: float) -> Mask:
    """For each row of ``loss``: True if the loss (of several, each) has fallen by less than the share ``fall``."""
    values = loss["loss.value"]
    flat = np.zeros(len(rows), dtype=np.bool_)
    for i, row in enumerate(rows):
        before, now = (np.median(values[row + 1 - n : row + 1 - n + WINDOW], axis=0) for n in (2 * WINDOW, WINDOW))
        flat[i] = bool((before - now < fall * np.abs(before)).all())
    return flat


RULE = Rule(
    id="uniform_attention",
    title="Attention that stays uniform",
    severity="info",
    site="attention",
    message="The rows of {module} have {value:.2%} of their possible entropy: it looks at all keys alike.",
    refute="the entropy of the head falls later, or the loss is as low as the task allows",
    remedies=(
        Remedy("see whether the loss is as low as it should be; if so, the model has more heads than it needs"),
        Remedy("lower the learning rate or lengthen the warm-up, so that heads do not die early"),
        Remedy("begin with larger query and key weights"),
    ),
    params=(
        Param(
            "entropy", 0.99, "of ln(keys)",
            "own choice: own sweep of learning rates 0.999 where heads died, at most 0.985 where the loss fell",
        ),
        Param("fall", 0.02, "of the median loss", "own choice: over 200 recorded steps against the 200 before"),
    ),
    needs=("attn_entropy.normalised", "loss.value"),
    check=check,
    lookback=2 * WINDOW,
    hold=20,
    experimental=True,
    doc=__doc__ or "",
)  # fmt: skip
