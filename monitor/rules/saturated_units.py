"""Most units of a hidden layer lie at an end of their range.

What it means:
    A tanh near ±1, or a sigmoid near 0 or 1, on nearly every row: its slope there is below 4 % of the largest, so that
    hardly any gradient passes, and the layer answers with signs. Layers in front of it learn slowly or not at all.

How it is decided:
    In at least 75 % of the units behind a tanh, a sigmoid, a hard version of them or a hardtanh, more than 95 % of the
    rows lie within 1 % of the range of an end, at 3 looks one after another; looks are at steps 0, 3, 10, 25, 50, and
    then every hundredth. Gates (what multiplies something else, as in recurrent cells), outputs of the model, layers of
    fewer than 8 units and fewer than 16 rows are not judged.

What to do:
    See when it began. From the first step on: normalise the inputs, begin with smaller weights (Xavier, with the gain
    of the function). Later: the learning rate is too large, and weights have grown; lower it, use weight decay, clip
    gradients. A normalisation in front keeps units in the middle; ReLU, GELU and their like have no upper end.
    "Saturated before" is the share at the last look at which the layer was sound.

When it is wrong:
    Codes that are meant to be binary (hashing, quantised bottlenecks). A layer may learn its first weights well and
    then only sharpen them, at the end of a long training on few data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._units import GATE, LOOKS, ROLE, ROWS, TRAININGS, UNITS, before, layers


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Layers most of whose units are saturated."""
    block = window["saturation.share"]
    share = block["saturation.share"]
    judged, units, rows, role = layers(window, block, p)
    judged &= role != GATE
    mask = judged & (share >= p["share"])
    evidence = {}
    if mask.any():
        was = before(block.steps, share, judged & ~mask)
        evidence = {"units": units, "rows": rows, "saturated_before": was}
    yield Hits(block.steps, block.modules, mask, judged, share, p["share"], evidence)


RULE = Rule(
    id="saturated_units",
    title="Saturated units",
    severity="warning",
    site="activation",
    message="{value:.0%} of the {units:.0f} units of {module} lie at an end of their range on nearly all of {rows:.0f} "
    "rows, since step {step}.",
    refute="the loss goes on falling at the same pace, or the codes are meant to be binary",
    remedies=(
        Remedy("if it began with the run: normalise the inputs, begin with smaller weights"),
        Remedy("if it began later: lower the learning rate, use weight decay, clip gradients"),
        Remedy("use a normalisation in front, or an activation function without an upper end (ReLU, GELU)"),
    ),
    params=(
        Param("share", 0.75, "of the units", f"{TRAININGS}: 0.41 and less; 0.86 and more in 4 that saturate"),
        Param("units", 8, "units", "as dead_units"),
        Param("rows", 16, "rows", "as dead_units"),
    ),
    needs=("saturation.share", UNITS, ROWS, ROLE),
    check=check,
    lookback=LOOKS,
    hold=3,
    release=2,
    doc=__doc__ or "",
)
