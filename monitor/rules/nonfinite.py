"""NaN or infinity, and where it was born.

What it means:
    A number that is not finite was read at some site of the step. From there it spreads to everything computed after
    it, within one or two steps to every parameter, and training cannot recover by itself. So the place where it was
    seen first matters, not the hundred places where it is seen afterwards.

How it is decided:
    One non-finite value is enough: in an input, an activation (looked for only when the loss is not finite), a logit,
    a loss, a gradient, an update or a parameter. Findings are
    ordered by step, then by site in the order in which a step reaches them, then by module; for gradients the *last*
    module in order of execution comes first, because the backward pass begins at the end of the model. Infinite
    logits count only if a loss of the same step is not finite either: a logit of −inf is how a script masks a class.

What to do:
    Look at the head of the incident. An input: the batch. A logit or loss with finite inputs: overflow in the forward
    pass, log(0), 0/0. A gradient with a finite loss: the derivative of a norm, a square root or a division at 0 in
    the module named or just after it. An update or a parameter with finite gradients: the optimizer's state or its
    epsilon.

When it is wrong:
    Mixed precision with a dynamic loss scale meets infinite gradients on purpose and skips the step. Such a step
    makes no row with most optimizers; with fused ones it may, and then one isolated finding in the gradients, with
    finite parameters afterwards, is the loss scale doing its work.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from monitor.metric import Mask
from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._series import latest

#: Columns that count non-finite entries, then columns that are such an entry themselves: column -> site.
_COUNTS = {
    "input_rms.nonfinite": "input",
    "activation_nonfinite.count": "activation",
    "grad_norm.nonfinite": "gradient",
}
_VALUES = {
    "loss.value": "loss",
    "logit_scale.max_abs": "logits",
    "update_ratio.update_norm": "update",
    "param_norm.norm": "parameter",
}


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Non-finite entries, one `Hits` per site."""
    for ref, site in (_COUNTS | _VALUES).items():
        block = window[ref]
        steps, value, has = block.steps, block[ref], block.has(ref)
        broken = has & (value > p["entries"]) if ref in _COUNTS else has & ~np.isfinite(value)
        if site == "logits" and broken.any():
            broken &= np.isnan(value) | _loss_broken(window, block.steps)
        yield Hits(steps, block.modules, broken, has, value, p["entries"], site=site, backward=site == "gradient")


def _loss_broken(window: Window, steps: np.ndarray) -> Mask:
    """``(step, 1)`` bool: some loss recorded at that step, or the last one before it, is not finite."""
    loss = window["loss.value"]
    value, has = latest(loss, steps, loss.modules)
    return np.any(has & ~np.isfinite(value), axis=1, keepdims=True)


RULE = Rule(
    id="nonfinite",
    title="Non-finite value",
    severity="critical",
    site="input",
    message="{module} ({site}) holds NaN or infinity from step {step} on.",
    refute="the head lies in the gradients, stands alone, and the parameters stay finite: a loss scale at work",
    remedies=(
        Remedy("look at the site, module and step of the head: everything later is a consequence"),
        Remedy("run that step again under torch.autograd.set_detect_anomaly(True)"),
        Remedy("resume from before the first step; skip the batch, lower the learning rate or use float32 there"),
    ),
    params=(Param("entries", 0, "count", "definition: one non-finite entry is one too many"),),
    needs=(*_VALUES, *_COUNTS),
    check=check,
    lookback=1,
    doc=__doc__ or "",
)
