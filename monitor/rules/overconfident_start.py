"""The model is sure of its answers before it has learnt anything.

What it means:
    In the first step a classifier knows nothing and should say so: its loss should be near ln K, that of a uniform
    guess among K classes. Here the logits are so large that nearly all probability lies on one class, and a wrong one
    costs many times ln K. The first updates do nothing but shrink the logits; with plain SGD they may break the model.
    Weights that begin too large are one reason, inputs that are not scaled (pixels of 0 to 255, one feature in other
    units), or the weights of an embedding that is also the output, drawn with a standard deviation of 1, are others.

How it is decided:
    At step 0, over 16 rows or more: a label drawn at random has a loss of at least 4 ln K, and the mean probability of
    the first choice lies 0.5 or more above the share of right answers. A model that has been trained before is sure
    too, but it is right. Not a single right answer where chance would give one with a probability of 0.999 is no
    ignorance: a margin has been taken from the logit of the label (ArcFace, CosFace), and nothing is said.

What to do:
    Scale the inputs to mean 0 and variance 1, feature by feature. Then look at the layers from the first to the last
    for the one whose outputs are large, and begin with smaller weights there; for a last layer 0.02 or even 0 will do.

When it is wrong:
    A beginning with large weights on purpose, as in studies of grokking. A pretrained model whose classes have been put
    in another order is found as well, and rightly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._series import exactly

LEVEL, EXCESS, MEAN, SPREAD = "log_z.mean", "log_z.excess", "logit_scale.mean", "logit_scale.row_std"
RIGHT, SURE, ROWS = "train_accuracy.accuracy", "train_accuracy.top1_mass", "train_accuracy.rows"


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Logits of the first step that are far apart."""
    if window.first > 1:
        return
    block = window[LEVEL]
    steps, modules = block.steps, block.modules
    others = (exactly(window[ref], steps, modules) for ref in (EXCESS, MEAN, SPREAD, RIGHT, SURE, ROWS))
    (excess, mean, spread, right, sure, rows), known = zip(*others, strict=True)
    level = block[LEVEL]
    cost, guess = level - mean, level - excess
    has = block.has(LEVEL) & np.logical_and.reduce(known) & (rows >= p["rows"])
    has &= (steps <= 1)[:, None]  # the second step, which is not judged, ends what the first has begun
    mask = has & (steps == 0)[:, None] & (cost >= p["times"] * guess) & (sure - right >= p["gap"])
    with np.errstate(all="ignore"):
        mask &= (right > 0) | ((1 - np.exp(-guess)) ** rows >= p["chance"])
    evidence = {"guess": guess, "accuracy": right, "top1_mass": sure, "row_std": spread}
    yield Hits(steps, modules, mask, has, cost, p["times"] * guess, evidence)


RULE = Rule(
    id="overconfident_start",
    title="Sure before anything is learnt",
    severity="warning",
    site="logits",
    message="At the first step a random label has a loss of {value:.3g} in {module}, where a uniform guess has "
    "{guess:.3g}: the first choice is given {top1_mass:.0%} and is right in {accuracy:.0%} of the rows.",
    refute="the first loss is near ln K when inputs are scaled and the last layer's weights begin at 0",
    remedies=(
        Remedy("scale the inputs to mean 0 and variance 1, every feature by itself"),
        Remedy("begin with smaller weights: those of the last layer, or of the first whose outputs are large"),
    ),
    params=(
        Param("times", 4, "ln K", "own choice: 1.11 at most in 57 healthy trainings with a cross-entropy"),
        Param("gap", 0.5, "fraction", "own choice: what is sure after training is right"),
        Param("rows", 16, "rows", "own choice: so few right answers are no accident then"),
        Param("chance", 0.001, "probability", "own choice: that a uniform guess is never right"),
    ),
    needs=(LEVEL, EXCESS, MEAN, SPREAD, RIGHT, SURE, ROWS),
    check=check,
    lookback=1,
    release=1,
    doc=__doc__ or "",
)
