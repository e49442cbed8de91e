"""How unusual the loss is for this run: robust standard deviations from its recent past.

    z_t = (loss_t − median) / max(1.4826 · MAD, 2^-9 · |median|)    over the 100 recorded steps before t, not t itself

At least 20 finite losses are needed; before that, and where most of the past is exactly 0, there is no z. A smooth
trend widens the MAD and so does not alarm.

Healthy: between −4 and 4; somewhat below 0 while the loss falls.

Unhealthy: above 6 (a loss spike). Together with `grad_norm_z` above 6 in the same step it points to the batch or to
the step before; alone, to the loss itself.

Source: robust z of a loss or gradient norm over the past 100 points; the same idea with mean and standard deviation
over 1,000 points is OLMo's spike score. Floor and minimum are ours: `monitor.robust`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf, nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.robust import WINDOW, robust_z


def compute(block: Block) -> Mapping[str, Result]:
    """The z of every loss against the recorded steps before it."""
    return {"z": robust_z(block["loss.value"], block.has("loss.value"))}


def oracle() -> Iterable[Case]:
    """Baselines whose median and MAD are found by hand."""
    past: list[list[float]] = [[float(i)] for i in range(1, 21)]
    yield Case(
        {"loss.value": [*past, [10.5 + 6 * 7.413]]},
        {"z": [[None]] * 20 + [[6.0]]},
        "1..20: median 10.5, deviations .5 .5 1.5 1.5 … 9.5 9.5 with median 5, scale 1.4826 · 5 = 7.413",
    )
    yield Case(
        {"loss.value": [[2.0]] * 20 + [[2.0], [2.0 + 2.0**-6], [nan], [inf]]},
        {"z": [[None]] * 20 + [[0.0], [4.0], [nan], [inf]]},
        "a constant baseline: one bfloat16 step (2 · 2^-7) is 4 floors of 2 · 2^-9; NaN and inf stay what they are",
    )
    yield Case({"loss.value": [[0.0]] * 20 + [[3.0]]}, {"z": [[None]] * 21}, "a baseline of zeros has no scale")


METRIC = Metric(
    id="loss_z",
    title="Loss against its recent past",
    site="loss",
    columns=(Column("z", "robust sigma", "distance of the loss from the median of the steps before"),),
    compute=compute,
    source="definition (robust z over 100 past points)",
    cost="nothing while training: computed from loss.value",
    plot=Plot("z"),
    oracle=oracle,
    needs=("loss.value",),
    lookback=WINDOW,
    doc=__doc__ or "",
)
