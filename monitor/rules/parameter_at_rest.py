"""A parameter that belongs to an optimizer does not move at all.

What it means:
    Step after step the parameter is the same to the last bit, so its part of the model stays as it began. Either it
    has no gradient (what it feeds does not reach the loss: ``detach()``, a branch that is not used), or one that is
    exactly 0 (units behind it that are dead, weights behind it that are all 0), or its learning rate is 0.

How it is decided:
    The norm of its update is exactly 0 at all of the last 10 looks, which are 90 steps or more, and at the last of them
    it has no gradient, or one of 0, or a learning rate of 0. An update that is lost in rounding is not counted: the
    bias of a layer in front of a normalisation rests like that, and nothing needs it.

What to do:
    Without a gradient: see where its output goes. With one that is 0: look at the activations behind it, begin with
    smaller biases or other weights. With a learning rate of 0: see how the groups of the optimizer and its schedule are
    made. What is meant to rest needs no gradient: requires_grad_(False).

When it is wrong:
    Parts of a pretrained model that a task does not use (a pooler, a second head) rest rightly, and so do groups that
    are thawed later; experts that are sent nothing; a bias that cancels out of the loss, as that of a critic's last
    layer; everything, once a loss with a margin is 0. That is why this is information and no warning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._series import ODD, exactly, rates

CHANGE = "update_ratio.update_norm"


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Parameters whose last updates were all exactly 0."""
    block, looks = window[CHANGE], int(p["looks"])
    steps, modules, has = block.steps, block.modules, block.has(CHANGE)
    mask = np.zeros_like(has)
    if len(steps) >= looks:
        # of several optimizers each has rows of its own, so that of the last rows not all need be this parameter's
        window_of = np.lib.stride_tricks.sliding_window_view
        moved = window_of(has & ~(block[CHANGE] <= p["change"]), looks, axis=0).any(axis=2)
        seen = window_of(has, looks, axis=0).sum(axis=2) >= looks / 2
        apart = steps[looks - 1 :] - steps[: len(steps) - looks + 1] >= p["steps"]
        mask[looks - 1 :] = has[looks - 1 :] & ~moved & seen & apart[:, None]
    evidence = {}
    if mask.any():
        gradients = window["grad_norm.norm"]
        size, given = exactly(gradients, steps, modules)
        known = exactly(gradients, steps, gradients.modules)[1].any(axis=1, keepdims=True)
        rate = rates(window, steps, modules)
        # else the update was lost in rounding: so it is with a bias in front of a normalisation, which nothing needs
        mask &= known & (~given | (size == 0) | (rate == 0))
        evidence = {"gradient": size, "learning_rate": rate}
    yield Hits(steps, modules, mask, has, block[CHANGE], p["change"], evidence)


RULE = Rule(
    id="parameter_at_rest",
    title="Parameter that never moves",
    severity="info",
    site="parameter",
    message="{module} has not changed by a single bit at the last ten looks.",
    refute="the parameter is meant to rest, or nothing in this task needs it",
    remedies=(
        Remedy("if its learning rate is 0: see how the optimizer's groups and its schedule are made"),
        Remedy("if it has no gradient, or one of 0: look for detach(), branches not used, dead units, weights of 0"),
        Remedy("if it is meant to rest: parameter.requires_grad_(False)"),
    ),
    params=(
        Param("change", 0, "1", "definition: a parameter that moves at all is not found"),
        Param("looks", 10, "looks", "own choice; the untrained weights of TheDeepChecker, after 20 steps"),
        Param(
            "steps",
            90,
            "steps",
            f"own choice: least distance of the first and last; {ODD} but for biases that cancel out of a loss",
        ),
    ),
    needs=(CHANGE, "grad_norm.norm", "learning_rate.lr"),
    check=check,
    lookback=10,
    release=1,
    doc=__doc__ or "",
)
