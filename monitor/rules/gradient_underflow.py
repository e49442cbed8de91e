"""Gradients are too small for float16: much of them has become 0.

What it means:
    In float16 nothing is smaller than 6e-8, and what is below 6e-5 has fewer bits the smaller it is. Gradients that
    are computed in it lose their small elements: those become 0, or all the same smallest number. The layers behind
    train on what is left, the first ones often on nothing.

How it is decided:
    A parameter is hit if of its gradient's elements that are not 0 at least a tenth (and 8 of them) have the very
    same smallest size, and that is what one unit of float16 is after unscaling and clipping; beside such a one also
    every parameter whose gradient is 0 altogether. At 5 looks in a row these parameters hold 30 % of all elements.
    Zeros for another reason (activations that are 0, rows of an embedding that were not used) do not count: what is not
    0 beside them is not that small. Gradients that are all 0 are not judged: parameter_at_rest tells of them.

What to do:
    Scale the loss: torch.amp.GradScaler, with an initial scale of 65,536. Or compute in bfloat16, whose range is that
    of float32. If there is a scaler: see why its scale is so small.

When it is wrong:
    Late in a training, when what is left to learn is little, gradients fall below what anybody needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._gradient import clipping
from monitor.rules._series import exactly, latest

COARSE, ZERO, LEAST = "gradient_zeros.coarse", "gradient_zeros.zero", "gradient_zeros.least"
LOOKED, ELEMENTS = "gradient_zeros.looked", "gradient_zeros.elements"
#: The smallest number of float16.
UNIT = 2.0**-24
#: A perceptron, a convolutional network, an autoencoder and a transformer, with losses times 1 to 2^-15.
RUNS = "calibrated on 4 networks under float16 autocast, with and without a loss scale"


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Looks at which a share of the parameters is at the end of float16."""
    block = window[ZERO]
    steps, modules, zero, has = block.steps, block.modules, block[ZERO], block.has(ZERO)
    (coarse, some), (least, _) = (exactly(window[ref], steps, modules) for ref in (COARSE, LEAST))
    looked, elements = (exactly(window[ref], steps, modules)[0] for ref in (LOOKED, ELEMENTS))
    scale, scaled = latest(window["loss_scale.scale"], steps, ("",))
    units = least * np.where(scaled, scale, 1.0) / clipping(window, steps) / UNIT
    same = coarse * (1 - zero) * looked
    hit = some & (coarse >= p["coarse"]) & (same >= p["same"]) & (units <= p["units"])
    gone = has & (zero == 1) & hit.any(axis=1, keepdims=True)
    weight = np.where(has, elements, 0.0)
    share = ((hit | gone) * weight).sum(axis=1) / weight.sum(axis=1)
    judged = np.isfinite(share) & some.any(axis=1)
    lost = (np.where(hit | gone, zero * weight, 0.0)).sum(axis=1) / np.where(hit | gone, weight, 0.0).sum(axis=1)
    yield Hits(
        steps, ("",), (judged & (share >= p["share"]))[:, None], judged[:, None], share[:, None], p["share"],
        {"zeros_in_these": lost[:, None]},
    )  # fmt: skip


RULE = Rule(
    id="gradient_underflow",
    title="Gradient underflow",
    severity="warning",
    site="gradient",
    message="Parameters with {value:.0%} of all elements have gradients at the end of what float16 can hold; "
    "{zeros_in_these:.0%} of these gradients' elements are exactly 0.",
    refute="with a larger loss scale, or in bfloat16, no more elements of the gradients differ from 0",
    remedies=(
        Remedy("scale the loss: torch.amp.GradScaler around backward() and step()"),
        Remedy("compute in bfloat16, which needs no scale"),
    ),
    params=(
        Param("coarse", 0.1, "fraction", f"{RUNS}: 0.1 to 1 where the loss suffers, at most 0.004 with a scale"),
        Param("same", 8, "elements", "own choice: of numbers that are not rounded hardly any two are the smallest"),
        Param("units", 1.5, "units", "definition: one unit is the smallest number of float16, 2^-24"),
        Param("share", 0.3, "fraction", f"{RUNS}: less for long where the loss hardly suffers; of all elements"),
    ),
    needs=(ZERO, COARSE, LEAST, LOOKED, ELEMENTS, "loss_scale.scale", "clip.coefficient"),
    check=check,
    lookback=1,
    hold=5,
    release=5,
    doc=__doc__ or "",
)
