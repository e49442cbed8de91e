"""The training goes on in evaluation mode, after it had begun in training mode.

What it means:
    `model.eval()` was called for an evaluation and `model.train()` was not called again. From then on dropout drops
    nothing, and batch normalisation neither uses its batch nor keeps its averages up to date. The training loss drops
    at once, and the model overfits sooner than it was meant to.

How it is decided:
    At 2 looks in a row the model is called in evaluation mode, to be trained on, with modules in it that depend on the
    mode and had been in training mode at an earlier look; and none of the parameters that were trained then has been
    frozen since. A model that is in training mode itself, with some parts in evaluation, is as somebody wanted it.

What to do:
    Call `model.train()` after every evaluation, best at the beginning of the loop over batches and not before the loop
    over epochs.

When it is wrong:
    The whole model is put into evaluation mode on purpose while all of it is trained: to end a training without noise,
    for instance. Nothing is known of parts in evaluation from the first step on, as of a pretrained model that was
    loaded so, nor of dropout that a forward calls as a function.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._series import exactly

LEFT, MODULES = "training_mode.left", "training_mode.modules"


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Looks at which modules were trained in evaluation that had been in training."""
    block = window[LEFT]
    value, has = block[LEFT], block.has(LEFT)
    modules = exactly(window[MODULES], block.steps, block.modules)[0]
    yield Hits(block.steps, block.modules, has & (value > p["left"]), has, value, p["left"], {"modules": modules})


RULE = Rule(
    id="trained_in_eval_mode",
    title="Trained in evaluation mode",
    severity="warning",
    site="activation",
    message="{value:.0f} of {modules:.0f} dropout or normalisation modules are in evaluation mode while the model is "
    "trained; they were in training mode before.",
    refute="model.training is True while the loss is computed, or eval() was called on purpose",
    remedies=(Remedy("call model.train() after every evaluation, at the beginning of the loop over batches"),),
    params=(Param("left", 0, "modules", "definition: one that was left in evaluation mode is one too many"),),
    needs=(LEFT, MODULES),
    check=check,
    lookback=1,
    hold=2,
    release=2,
    doc=__doc__ or "",
)
