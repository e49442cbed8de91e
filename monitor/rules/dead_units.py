"""Nearly all units of a hidden layer are dead.

What it means:
    Look after look the same layer answers 0 to every row in nearly all of its units. A ReLU that answers 0 passes no
    gradient: what is in front of it learns nothing, and the few units that are left, if any, are all that the next
    layer hears of the input. Dead units do not come back by themselves. Where all are dead the layer is a constant.

How it is decided:
    At least 90 % of the units behind an activation function are 0 on all rows that were read (16 or more, up to
    4,096), so that at most 32 are left, at 3 looks one after another; looks are at steps 0, 3, 10, 25, 50, and then
    every hundredth. Layers of fewer than 8 units and outputs of the model are not judged.

What to do:
    See when it began. From the first step on: biases far below 0, weights that are too large, inputs that are not
    normalised. Later: the update before it was too large, after which weights or biases are where no input reaches the
    unit; lower the learning rate, warm it up, clip gradients. "Dead before" is the share at the last look at which the
    layer was sound. A normalisation in front of the activation function, or a leaky one (GELU, SiLU, leaky ReLU), keeps
    units alive. Dead units can be made anew (ReDo); in sparse autoencoders that is usual.

When it is wrong:
    Half of the units being dead is no trouble in a wide layer, which is why so many must be. A layer that is meant to
    fire rarely, on batches of few rows; a branch beside a shortcut that the model has learnt to leave unused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._units import LOOKS, ROLE, ROWS, TRAININGS, UNITS, before, layers


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Layers most of whose units are dead."""
    block = window["dormant_units.dead"]
    dead = block["dormant_units.dead"]
    judged, units, rows, _ = layers(window, block, p)
    alive = (1 - dead) * units
    mask = judged & (dead >= p["share"]) & (alive.round() <= p["alive"])
    evidence = {}
    if mask.any():
        was = before(block.steps, dead, judged & ~mask)
        evidence = {"alive": alive.round(), "units": units, "rows": rows, "dead_before": was}
    yield Hits(block.steps, block.modules, mask, judged, dead, p["share"], evidence)


RULE = Rule(
    id="dead_units",
    title="Dead units",
    severity="warning",
    site="activation",
    message="{alive:.0f} of the {units:.0f} units of {module} are alive: the others are 0 on all {rows:.0f} rows that "
    "were read, since step {step}.",
    refute="the dead units are other ones at every look, or the branch is meant to be unused",
    remedies=(
        Remedy("if it began with the run: look at biases, initial weights and the scale of the inputs"),
        Remedy("if it began later: lower the learning rate or warm it up, and clip gradients"),
        Remedy("use a normalisation in front, or an activation function with a slope everywhere (GELU, leaky ReLU)"),
    ),
    params=(
        Param(
            "share", 0.9, "of the units", f"{TRAININGS}: 0.82 and less, but for one with 60 alive; 0.94 in 11 that die"
        ),
        Param(
            "alive", 32, "units", "a sparse autoencoder of 1,024 units does well with 60 alive; 4 and fewer in those 11"
        ),
        Param("units", 8, "units", "own choice: a squeeze of 4 units lost 3 and did well"),
        Param("rows", 16, "rows", "own choice: on one row half of the units are 0 by nature"),
    ),
    needs=("dormant_units.dead", UNITS, ROWS, ROLE),
    check=check,
    lookback=LOOKS,
    hold=3,
    release=2,
    doc=__doc__ or "",
)
