"""The gradient of a parameter jumped, as a whole or in a few elements.

What it means:
    One step's gradient was many times its usual size. Adam divides by a second moment that has not seen such a
    gradient, so the step is too large now, and afterwards the lifted second moment keeps steps too small for
    thousands of steps: a spike of 1000 times the usual size needs about 6,900 steps to be forgotten at beta2 = 0.999.

How it is decided:
    Norm, before it was clipped: 5 times the median of the 100 points before it, and on the logarithmic scale 8 robust
    standard deviations above it and twice as far as the third largest of them. Elements: the largest g² is 5000 times
    the (bias-corrected) second moment before the step, and that one element holds half of the tensor's energy, which
    lifts the norm to 1.2 times its median at least; both are looked for in every fourth step of a large parameter, and
    on an accelerator in every eighth, of a large one in every 32nd. The first 50 points of a parameter are not judged:
    leaving the first plateau is no spike. Every parameter is judged by itself; the head of the incident is the first in
    order of execution. Where curvature was measured and explains a jump of a norm, the rule edge_oscillation has it
    instead.

What to do:
    If an input jump or a loss spike stands before it in the incident, it is a consequence: repair the batch. If the
    evidence has a learning rate factor, the learning rate had just been raised so many times: undo that. If not, look
    at the tensor named first. If every step trains on the same batch, no batch is to blame: it may be the edge of
    stability, which `curvature="auto"` measures. Clip the gradient, and begin the optimizer's moments afresh after a
    large spike (monitor.remedies.SpikeAwareClipping does both). If bursts of spikes come again and again while the loss
    is as low as it gets, no batch is to blame but the step size: let the learning rate fall.

When it is wrong:
    A spike that was clipped did the less harm the more it was (the evidence says to what); one that was clipped by
    other means than ``clip_grad_norm_`` is not seen. Rows of an embedding that are rarely met have almost no second
    moment, so their elements exceed 5000 in healthy trainings; that is why an element must also hold half of the
    energy. A spike is missed if three larger ones stand in the 100 points before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._gradient import NEEDS, PARAMS, jumps, swings
from monitor.rules._series import exactly, raised


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Parameters whose gradient stands out from the points before it."""
    jumped = jumps(window, p)
    steps, modules, found, norm, start = jumped.steps, jumped.modules, jumped.found, jumped.norm, jumped.start
    ratio, _ = exactly(window["spam_spike.ratio"], steps, modules)
    element = np.sqrt(ratio)
    elements = found.known & (element > p["element"])
    mask = found.mask
    evidence = {"norm": norm}
    if elements.any() or mask.any():
        share = (exactly(window["grad_norm.max_abs"], steps, modules)[0] / jumped.clipping / norm) ** 2
        elements &= share >= p["energy"]
        for i, j in np.argwhere(elements & ~mask):
            past = slice(max(start + i - int(p["window"]), 0), start + i)
            elements[i, j] = norm[i, j] >= p["lift"] * np.median(jumped.all_norms[past, j][jumped.usable[past, j]])
        mask = mask & ~(swings(window, jumped, p)[0] & ~elements)
        evidence |= {"median": np.exp(found.median), "z": found.z, "element": element, "element_energy": share}
        evidence["learning_rate_factor"] = raised(window, steps, mask | elements)
        evidence["clipped_to"] = np.where(jumped.clipping < 1, jumped.clipping * norm, np.nan)
    yield Hits(
        steps,
        modules,
        mask | elements,
        found.known,
        np.where(mask, jumped.times, element),
        np.where(mask, p["times"], p["element"]),
        evidence,
    )


RULE = Rule(
    id="gradient_spike",
    title="Gradient spike",
    severity="warning",
    site="gradient",
    message="The gradient of {module} jumped to {value:.3g} times its usual size (norm {norm:.3g}).",
    refute="other parameters and the loss took no notice, and the parameter is rarely used",
    remedies=(
        Remedy("find the batch of the peak step, and skip or repair it"),
        Remedy("clip the gradient norm: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)"),
        Remedy(
            "cap spiked elements and, after a spike of 100 times and more, begin Adam's moments afresh",
            "monitor.remedies.SpikeAwareClipping",
        ),
        Remedy("if bursts of them come back on other batches, lower the learning rate or let it fall"),
    ),
    params=(
        *PARAMS,
        Param("element", 5000**0.5, "times the root of the second moment", "SPAM (arXiv 2501.06842), √Θ with Θ = 5000"),
        Param("energy", 0.5, "fraction", "spikes' share of the tensor's energy; 0 false alarms in calibration"),
        Param(
            "lift",
            1.2,
            "times the median",
            "definition: an element with half of the energy adds √2 to what was there, if that stays; else the largest "
            "element is not the spiked one",
        ),
    ),
    needs=(*NEEDS, "grad_norm.max_abs", "spam_spike.ratio"),
    check=check,
    lookback=100,
    doc=__doc__ or "",
)
