"""Autocast is never left, so that the model computes with the parameters of the first step for ever.

What it means:
    Inside ``with torch.autocast(…)`` each parameter is converted to 16 bits once, and the copy is kept until the
    outermost such ``with`` is left. Put around the whole loop it is never left: the optimizer moves the parameters, and
    forward and backward go on with the copies of the first step. The loss stays what it was at the beginning, and what
    is saved at the end was never tried.

How it is decided:
    At 3 looks a number of our own that was changed after an update inside autocast had its old value in the next
    forward.

What to do:
    Put ``with torch.autocast(…)`` inside the loop, around forward and loss of one batch; backward and step come after
    it.

When it is wrong:
    Never that we know of: with cache_enabled=False nothing is kept, and nothing is found.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from monitor.rule import Hits, Param, Remedy, Rule, Window

STALE = "autocast_cache.stale"


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Forwards with old parameters."""
    block = window[STALE]
    value, has = block[STALE], block.has(STALE)
    yield Hits(block.steps, block.modules, has & (value >= p["limit"]), has, value, p["limit"])


RULE = Rule(
    id="autocast_around_loop",
    title="Autocast around the whole loop",
    severity="critical",
    site="parameter",
    message="The forward computes with copies of the parameters that autocast has made before the last update.",
    refute="the loss of a batch changes when the parameters are updated",
    remedies=(
        Remedy("enter torch.autocast anew for every batch, around forward and loss only"),
        Remedy("if it must be entered only once: torch.autocast(…, cache_enabled=False)"),
    ),
    params=(Param("limit", 1, "1", "definition: it is 0 or 1"),),
    needs=(STALE,),
    check=check,
    hold=3,
    release=1,
    doc=__doc__ or "",
)
