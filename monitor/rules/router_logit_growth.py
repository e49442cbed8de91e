"""The scores of a router have grown far beyond what they were.

What it means:
    The router has become so sure of itself that its softmax is a hard choice: almost no gradient passes through it, its
    choices cannot be corrected any more, and in half precision neighbouring scores of that size are the same number.

How it is decided:
    The z-loss, the mean of the squared log-sum-exp of the scores, is more than 5 times what it was at a twentieth of
    the steps so far, and at least 50, for 20 points, which are 100 steps. So it is judged from step 200 on.

What to do:
    Add a z-loss on the router's scores, with the coefficient 0.001, and give the router a lower learning rate.

When it is wrong:
    A constant added to all scores of a token changes the z-loss and nothing else. A router that begins with scores near
    zero and few experts has a tiny z-loss at first; the limit of 50 (a log-sum-exp of 7) is there for it. Routers with
    a sigmoid do not sum over experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._router import needs, routers


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Routers whose z-loss is a multiple of what it was."""
    r = routers(window, p, "z", "early_z", "max_logit")
    early = r.more["early_z"]
    has = r.has & ~np.isnan(early)
    limit = np.maximum(p["growth"] * early, p["floor"])
    evidence = {"early": early, "max_logit": r.more["max_logit"]}
    yield Hits(r.steps, r.modules, has & (r.value > limit), has, r.value, limit, evidence)


RULE = Rule(
    id="router_logit_growth",
    title="Router scores grow",
    severity="warning",
    site="router",
    message="The z-loss of {module} is {value:.4g}, up from {early:.3g} at a twentieth of the steps.",
    refute="the largest score and the entropy of the choices stay as they are",
    remedies=(
        Remedy("add z_loss(scores, coefficient=1e-3) to the loss", "monitor.remedies.z_loss"),
        Remedy("lower the router's learning rate"),
    ),
    params=(
        Param(
            "growth", 5, "times",
            "calibrated: 44 routers of 22 healthy MoE trainings stay below 2.4; 12 of 16 whose learning rate is 10 or "
            "30 times higher pass 5, up to 15",
        ),
        Param("floor", 50, "1", "calibrated on the same: the healthy ones stay below 19, those 16 end at 67 to 811"),
        Param("settle", 200, "steps", "own choice: a twentieth of it is step 10"),
        Param("assignments", 0, "per expert", "the mean over tokens does not depend on how many there are"),
    ),
    needs=needs("z", "early_z", "max_logit"),
    check=check,
    lookback=1,
    hold=20,
    doc=__doc__ or "",
)  # fmt: skip
