"""A router gives a few experts far more than their share, for a long time.

What it means:
    Some experts do most of the work and learn from most of the tokens; the others are paid for and hardly trained.
    With a capacity limit the surplus is dropped, and with experts on several devices the busiest decides the speed.

How it is decided:
    The coefficient of variation of the loads is compared with the largest one possible, √(E/k − 1), which is reached
    when all tokens go to the same k of E experts. What chance alone gives with T tokens, 1/T of the square, is taken
    away. The rest is at least half of the largest for 20 points, which are 100 steps. The first 50 steps, and steps
    with fewer than 4 assignments an expert, are not judged. Dead experts alone are no fault: up to a fifth of the
    experts can be idle before the limit is reached, and healthy trainings have some.

What to do:
    Raise the weight of the balancing term (E · Σ f·P, usually 0.01), or add one; or steer the choice by a bias that
    follows the loads. Look at whether the router learns much faster than its experts: its own learning rate, halved.

When it is wrong:
    Loads are those of one process: with data in parallel each may be unbalanced and all together balanced. Small
    batches of one domain are unbalanced where the whole data are not. Without a balancing term a router with one expert
    a token may be unbalanced for some hundred steps and recover by itself. Small models often learn all the same, on
    fewer experts than they have: this is information; router_concentration is the warning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._router import SETTLED, TRAININGS, needs, routers


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Routers whose loads vary by a large part of what is possible."""
    r = routers(window, p, "cv", "max_violation")
    with np.errstate(all="ignore"):
        degree = np.sqrt(np.maximum(r.value**2 / (r.experts / r.k - 1) - 1 / r.tokens, 0))
    has = r.has & ~np.isnan(degree)
    violation = r.more["max_violation"]
    evidence = {
        "cv": r.value, "max_violation": violation, "experts": r.experts, "largest_load": (violation + 1) / r.experts
    }  # fmt: skip
    yield Hits(r.steps, r.modules, has & (degree >= p["degree"]), has, degree, p["degree"], evidence)


RULE = Rule(
    id="load_imbalance",
    title="Unbalanced experts",
    severity="info",
    site="router",
    message=(
        "The loads of the {experts:.0f} experts of {module} vary by {value:.0%} of what is possible; "
        "the busiest has {largest_load:.0%}."
    ),
    refute="the loads summed over all processes, or over a longer stretch of data, are even",
    remedies=(
        Remedy("raise the weight of the load-balancing term (usually 0.01), or balance by a bias on the choice"),
        Remedy("halve the router's learning rate"),
        Remedy("keep the router's scores small: add z_loss(scores, coefficient=1e-3)", "monitor.remedies.z_loss"),
    ),
    params=(
        Param(
            "degree", 0.5, "of the largest possible",
            f"calibrated on {TRAININGS}: 0 of 14 balanced, 1 of 10 without balancing, 12 of 16 provoked fire",
        ),
        *SETTLED,
    ),
    needs=needs("cv", "max_violation"),
    check=check,
    lookback=1,
    hold=20,
    doc=__doc__ or "",
)  # fmt: skip
