"""A router keeps exchanging the experts of the same tokens although the learning rate has come down.

What it means:
    The same tokens go to other experts at every look, while everything else has settled: each expert keeps learning
    what it will not be asked for, and what the run ends with is one shuffle among many.

How it is decided:
    On the first batch of the run, at least 15 % of the chosen experts are others than at the look before, at 3 looks in
    a row, while the learning rate of the first parameter group is at most a fifth of the largest so far. With a high or
    a constant learning rate nothing is judged: there a fifth to a third is exchanged in healthy trainings with a
    balancing term, early and late.

What to do:
    Let the router's own learning rate fall with the others', or freeze the router for the last part of training.

When it is wrong:
    Looks that are far apart let more change. Where the first group is not the one that most parameters belong to, its
    learning rate says little. A router that is not sure of its choice exchanges experts that make no difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._series import exactly


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Routers that exchange experts at a low learning rate."""
    block = window["pathway_churn.churn"]
    start = int(np.searchsorted(block.steps, window.first))
    steps, modules = block.steps[start:], block.modules
    value = block["pathway_churn.churn"][start:]
    lr, since = (exactly(window[f"pathway_churn.{name}"], steps, modules)[0] for name in ("lr_part", "steps"))
    has = block.has("pathway_churn.churn")[start:] & ~np.isnan(value) & (lr <= p["lr"])
    yield Hits(steps, modules, has & (value >= p["churn"]), has, value, p["churn"], {"since": since, "lr_part": lr})


RULE = Rule(
    id="late_pathway_churn",
    title="Pathways still change",
    severity="info",
    site="router",
    message="{module} sends {value:.0%} of the same tokens elsewhere than {since:.0f} steps before.",
    refute="looks at a shorter distance find less, or the router's probabilities are nearly even",
    remedies=(
        Remedy("let the router's learning rate fall with the others', or below them"),
        Remedy("freeze the router for the last part of training"),
    ),
    params=(
        Param(
            "churn", 0.15, "of the assignments",
            "calibrated at looks 50 steps apart: 18 healthy MoE trainings with a falling learning rate reach 0.1, "
            "3 of 4 whose router keeps three times its first one lie between 0.14 and 0.6",
        ),
        Param("lr", 0.2, "of the largest", "own choice: the last third of a cosine"),
    ),
    needs=("pathway_churn.churn", "pathway_churn.lr_part", "pathway_churn.steps"),
    check=check,
    lookback=1,
    hold=3,
    release=3,
    doc=__doc__ or "",
)  # fmt: skip
