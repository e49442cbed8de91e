"""Gradients are never put back to zero, so that every update is made with the sum of all so far.

What it means:
    ``backward()`` adds to the gradients that are there. Without ``zero_grad()`` between two updates the optimizer is
    given the gradient of this batch and those of all batches before it, taken at parameters that are long gone: a
    momentum that never fades. SGD oscillates and diverges; Adam hides the growth, learns more slowly and worse.

How it is decided:
    At 5 looks in a row every backward since the optimizer's update before found the gradient of that update untouched
    and added to it, and what was left over made up at least a hundredth of the sum. Nothing is guessed: a gradient that
    was zeroed, removed, scaled or written to by anybody in between does not count.

What to do:
    Call ``optimizer.zero_grad()`` once for every update: right after ``optimizer.step()``, or before the first backward
    of the next one. If it is called, see on what: the parameters of this optimizer must be among them.

When it is wrong:
    A method that is defined on the sum of all gradients (dual averaging) and keeps it in ``.grad``. The same mistake is
    missed when gradients are clipped by value or have noise added, or when backward cannot be seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._series import exactly

SHARE, BACKWARDS = "gradient_reuse.share", "gradient_reuse.backwards"


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Updates whose gradient holds that of the update before."""
    block = window[SHARE]
    share = block[SHARE]
    backwards, known = exactly(window[BACKWARDS], block.steps, block.modules)
    has = block.has(SHARE) & known & (backwards > 0)
    mask = has & (share >= p["limit"])
    yield Hits(block.steps, block.modules, mask, has, share, p["limit"], {"backwards": backwards})


RULE = Rule(
    id="gradients_carried_over",
    title="Gradients never zeroed",
    severity="warning",
    site="gradient",
    message="Every backward found the gradient of the update before still there and added to it: what was left over is "
    "{value:.2f} times the whole gradient's norm.",
    refute="the gradients are zeroed between two updates, or the method wants the sum of all of them",
    remedies=(
        Remedy("call optimizer.zero_grad() once per update, before its first backward or right after the step"),
        Remedy("if it is called: see that it reaches the parameters of this optimizer"),
    ),
    params=(
        Param(
            "limit",
            0.01,
            "of the norm",
            "own choice: less hardly changes an update, as under a loss scale of 65,536; zeroed gradients have a share "
            "of exactly 0",
        ),
    ),
    needs=(SHARE, BACKWARDS),
    check=check,
    lookback=1,
    hold=5,
    release=3,
    doc=__doc__ or "",
)
