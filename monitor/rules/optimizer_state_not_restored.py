"""A run goes on from a checkpoint, and its optimizer begins anew.

What it means:
    The model was loaded, the optimizer was not. Momentum and second moments of all the training so far are lost: Adam
    then moves every element by the whole learning rate in the first step, whatever its gradient, and some ten steps
    more by too much. The loss jumps, and takes its time to come back; a training that is resumed often never gets over
    it.

How it is decided:
    In each of the first 3 steps of an attempt that does not begin at step 0 the optimizer has itself counted no more
    updates than it has made since the attempt began.

What to do:
    Save optimizer.state_dict() with the model, and load it with optimizer.load_state_dict() after the optimizer is
    constructed and before the first step; also those of schedule and loss scaler.

When it is wrong:
    A second phase that is meant to begin with a fresh optimizer. SGD counts no updates, so that a lost momentum is not
    seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._series import exactly

COUNTED, SINCE = "optimizer_resumed.counted", "optimizer_resumed.since"


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """First steps of an attempt whose optimizer knows of no earlier ones."""
    block = window[COUNTED]
    steps, counted = block.steps, block[COUNTED]
    since, known = exactly(window[SINCE], steps, block.modules)
    has = block.has(COUNTED) & known & (steps >= p["minimum"])[:, None]
    yield Hits(
        steps,
        block.modules,
        has & (counted <= since),
        has,
        counted,
        since,
        {"steps_before": steps[:, None] - since + 1},
    )


RULE = Rule(
    id="optimizer_state_not_restored",
    title="Optimizer state not restored",
    severity="warning",
    site="update",
    message="The run goes on after {steps_before:.0f} steps, but all updates that its optimizer has counted are "
    "{value:.0f}.",
    refute="the optimizer was loaded from the checkpoint, or is meant to begin anew",
    remedies=(
        Remedy("load it: optimizer.load_state_dict(checkpoint['optimizer']), before the first step"),
        Remedy("save it beside the model: optimizer.state_dict(), with those of schedule and loss scaler"),
    ),
    params=(
        Param("earlier", 0, "updates", "definition: none of the earlier ones is in it"),
        Param("minimum", 10, "steps", "own choice: of fewer there is little to remember"),
    ),
    needs=(COUNTED, SINCE),
    check=check,
    lookback=1,
    hold=3,
    release=1,
    doc=__doc__ or "",
)
