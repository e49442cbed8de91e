"""The scale of an input jumped.

What it means:
    A batch was many times larger than the batches before it: a missing normalisation, a corrupt shard, other units, a
    different data source. Everything that follows in the step (loss, gradients, update) is then about the wrong
    thing.

How it is decided:
    The root mean square of each floating-point input is compared with the 100 batches before it on the logarithmic
    scale: it must be 8 times their median, 6 robust standard deviations above it, and three times as far above it as
    the second largest of them. So inputs of naturally wild scale, such as noise levels, do not fire.

What to do:
    Look at the batch of that step: its files, its normalisation, its units. Then decide whether to train on it.

When it is wrong:
    A change of data on purpose is one jump at the change. Batches that are too small or all zero are not looked for,
    and integer inputs (tokens) have no scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._series import CALIBRATION, spikes


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Inputs whose root mean square stands out from the batches before."""
    block = window["input_rms.rms"]
    start = int(np.searchsorted(block.steps, window.first))
    rms = block["input_rms.rms"]
    usable = block.has("input_rms.rms") & (rms > 0)
    found = spikes(np.log(rms), usable, start, p, floor=float(np.log(p["times"])))
    median = np.exp(found.median)
    evidence = {"rms": rms[start:], "median": median, "z": found.z}
    yield Hits(block.steps[start:], block.modules, found.mask, found.known, rms[start:] / median, p["times"], evidence)


RULE = Rule(
    id="input_jump",
    title="Input jump",
    severity="warning",
    site="input",
    message="{module} was {value:.3g} times its usual size: rms {rms:.3g}, median {median:.3g}.",
    refute="the data were changed on purpose at that step",
    remedies=(
        Remedy("look at the batch of that step (handle.note() records which samples it held); repair or drop it"),
        Remedy("normalise inputs in the model, so that no batch can change their scale"),
    ),
    params=(
        Param("times", 8, "times the median", "own choice: 8 bits instead of 5, ×10 and ×255 mistakes all exceed it"),
        Param("sigmas", 6, "robust σ of the logarithm", "as for spikes; 0 false alarms in calibration"),
        Param("window", 100, "points", "as for spikes"),
        Param("minimum", 20, "points", "as for spikes"),
        Param("record", 3, "times the excess", CALIBRATION),
        Param("company", 2, "rank", "own choice: one earlier jump in the window hides nothing"),
    ),
    needs=("input_rms.rms",),
    check=check,
    lookback=100,
    doc=__doc__ or "",
)
