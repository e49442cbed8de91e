"""The factor by which gradient clipping shortened the gradient.

    coefficient = min(1, threshold / ‖g‖)    as ``torch.nn.utils.clip_grad_norm_`` applied it

1 where the call was made and did not clip; absent where no call was made. The norm before clipping is
`grad_norm_total` divided by it.

Healthy: 1 most of the time, below it in a few per cent of the steps; below 1 in nearly all steps is a choice as well
(normalised gradients), but then the threshold, not the learning rate, sets the step.

Unhealthy: single values of 0.1 and less (a gradient spike that clipping has softened, not cured); 0 or NaN (the norm
was infinite or NaN).

Source: Pascanu et al. (2013), On the difficulty of training recurrent neural networks, sec. 3.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import recorded


def compute(block: Block) -> Mapping[str, Result]:
    """The coefficient as it was recorded."""
    return {"coefficient": recorded(block, "coefficient")}


def oracle() -> Iterable[Case]:
    """Threshold 1 and norms 0.5, 4, NaN; then a step that does not clip at all."""
    c = [[1.0], [0.25], [nan], [None]]
    yield Case({"coefficient": c}, {"coefficient": c}, "recorded values pass unchanged; no call is absent, not 1")


METRIC = Metric(
    id="clip",
    title="Clip coefficient",
    site="gradient",
    columns=(Column("coefficient", "1", "factor applied to all gradients"),),
    compute=compute,
    source="definition",
    cost="nothing: a number that clipping computes",
    plot=Plot("coefficient", log=True),
    oracle=oracle,
    reads="clip",
    doc=__doc__ or "",
)
