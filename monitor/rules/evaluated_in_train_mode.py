"""Losses are evaluated while dropout or batch normalisation is in training mode.

What it means:
    `model.eval()` is missing before an evaluation. Dropout goes on dropping, so that the evaluated loss is worse than
    the model and different each time. Batch normalisation normalises each batch with itself, and mixes the evaluated
    data into the averages that it keeps: what is measured depends on the batch size, and held-out data leak into the
    model.

How it is decided:
    At 2 evaluations in a row, with steps in between, a loss was made without gradients of an output of the model in
    training mode, of other data than those trained on, and nothing was evaluated in evaluation mode beside it. Noise
    that is only sampled makes no loss; losses before every step choose what to train on.

What to do:
    Call `model.eval()` before an evaluation and `model.train()` after it.

When it is wrong:
    The noise is wanted: a loss of each of several samples of dropout. Where the model is on an accelerator, data that
    were trained on are not known again, and a training loss measured once more in training mode looks the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._series import exactly

LOSSES, EVALUATED = "evaluation_mode.losses", "evaluation_mode.evaluated"
BESIDE = ("evaluation_mode.dropouts", "evaluation_mode.norms", EVALUATED)


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Evaluations in training mode alone that do not come before every step."""
    block = window[LOSSES]
    steps, value, has = block.steps, block[LOSSES], block.has(LOSSES)
    dropouts, norms, evaluated = (exactly(window[ref], steps, block.modules)[0] for ref in BESIDE)
    apart = np.diff(steps, prepend=np.int64(-2)) > p["apart"]
    mask = has & (value > 0) & (evaluated == 0) & apart[:, None]
    yield Hits(steps, block.modules, mask, has, value, 0.0, {"dropouts": dropouts, "norms": norms})


RULE = Rule(
    id="evaluated_in_train_mode",
    title="Evaluated in training mode",
    severity="warning",
    site="activation",
    message="{value:.0f} losses were evaluated while {dropouts:.0f} dropouts and {norms:.0f} normalisations were in "
    "training mode.",
    refute="model.training is False while the loss is evaluated, or the noise is wanted",
    remedies=(Remedy("call model.eval() before an evaluation and model.train() after it"),),
    params=(Param("apart", 1, "steps", "own choice: losses before every step choose what is trained on"),),
    needs=(LOSSES, *BESIDE),
    check=check,
    lookback=1,
    hold=2,
    release=2,
    doc=__doc__ or "",
)
