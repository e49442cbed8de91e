"""Parameters of 16 bits are trained directly, and most of their updates are rounded away.

What it means:
    The optimizer writes to bfloat16 or float16 parameters themselves. What it adds is smaller than half the distance
    to the next number of that format, so the sum is rounded back to what it was, in this step and in the next: small
    updates never add up. The loss falls for a while, by the few elements that are small enough to move, and then more
    slowly than it should, or not at all. Weight decay is lost in the same way where learning rate times decay is below
    1/512.

How it is decided:
    Over all parameters of 16 bits, by their elements, at 2 looks in a row a hundred steps apart: more than half of
    those with a gradient were left as they were by the update; and of all those with a gradient less than three
    quarters as many have moved in the hundred steps as would have, had each that moved done so three times. It is
    always the same ones. That tells rounding to the nearest from rounding at random and from errors that are carried
    on (Kahan, master weights inside the optimizer), under which every element has its turn. While the learning rate
    rises nothing is judged, nor parameters with a learning rate of 0 and those of whose gradient more than half is 0
    (embeddings, dead units).

What to do:
    Keep the parameters in float32 and compute in 16 bits: torch.autocast in the place of model.to(torch.bfloat16); or
    float32 copies that the optimizer updates (master weights); or an optimizer with stochastic rounding or Kahan
    summation. A larger learning rate or batch moves more of them.

When it is wrong:
    At the end of a fine-tuning whose gain was made in its first steps nothing may be lost any more. Norm gains rest
    long before matrices do, and hardly count here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from monitor.metric import Array
from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._series import Steps, exactly, latest, rates

LOST, STILL = "lost_updates.frac", "lost_updates.still"
ASKED, ELEMENTS = "lost_updates.asked", "lost_updates.elements"
#: A small transformer from its beginning and on another text, AdamW at rates from 1e-7 to 1e-3: bfloat16 against
#: float32, rounding at random and Kahan summation.
RUNS = "calibrated on a transformer in bfloat16 at 5 learning rates, rounded in 3 ways"


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Looks at which most elements rest that have rested all the time."""
    if not (window[STILL].steps >= window.first).any():
        return  # it is known at every hundredth step
    block = window[LOST]
    steps, modules, has = block.steps, block.modules, block.has(LOST)
    still, asked, elements = (exactly(window[ref], steps, modules)[0] for ref in (STILL, ASKED, ELEMENTS))
    weight = np.where(has & (asked >= p["asked"]) & (rates(window, steps, modules) != 0), asked * elements, 0.0)
    lost, moved = _mean(block[LOST], weight), 1 - _mean(still, weight)
    looks = int(p["looks"])
    expected, rising = np.full(len(steps), np.nan), np.zeros(len(steps), dtype=np.bool_)
    if len(steps) > looks:
        recent = np.lib.stride_tricks.sliding_window_view(1 - lost[1:], looks).mean(axis=1)
        expected[looks:] = -np.expm1(-recent * (steps[looks:] - steps[:-looks]) / p["turns"])
        lr = window["learning_rate.lr"]
        rate = latest(lr, steps, lr.modules)[0]
        rising[looks:] = (rate[looks:] > rate[:-looks]).any(axis=1)
    judged = np.isfinite(moved) & np.isfinite(expected) & ~rising
    mask = judged & (lost > p["limit"]) & ((expected == 0) | (moved < p["others"] * expected))
    evidence = {"moved_in_100_steps": moved, "expected": expected} | _decay(window, steps)
    yield Hits(
        steps, ("",), mask[:, None], judged[:, None], lost[:, None], p["limit"],
        {name: values[:, None] for name, values in evidence.items()},
    )  # fmt: skip


def _mean(values: Array, weight: Array) -> Array:
    """``(step,)`` over the parameters that have a weight; NaN where none has."""
    return np.where(weight > 0, values * weight, 0.0).sum(axis=1) / weight.sum(axis=1)


def _decay(window: Window, steps: Steps) -> dict[str, Array]:
    """What weight decay takes off in a step, where that is too little for every bfloat16 number."""
    groups: list[dict[str, Any]] = [g for o in window.facts.get("optimizers", ()) for g in o.get("groups", ())]
    decay = max((float(g["weight_decay"]) for g in groups if g.get("decoupled_weight_decay")), default=0.0)
    block = window["learning_rate.lr"]
    rate = latest(block, steps, block.modules)[0]
    if not decay or not rate.size:
        return {}
    step = decay * np.fmax.reduce(rate, axis=1)
    return {"weight_decay_in_a_step": np.where(step < 2**-9, step, np.nan)}


RULE = Rule(
    id="updates_lost_to_rounding",
    title="Updates lost to rounding",
    severity="warning",
    site="update",
    message="Of the elements of 16-bit parameters that have a gradient, {value:.0%} were left as they were by this "
    "update, and {moved_in_100_steps:.0%} have moved in the last hundred steps.",
    refute="the same training with float32 parameters under autocast reaches no lower loss",
    remedies=(
        Remedy("keep parameters in float32 and compute under torch.autocast, not model.to(torch.bfloat16)"),
        Remedy("update float32 master weights, or use an optimizer with stochastic rounding or Kahan summation"),
        Remedy("raise the learning rate"),
    ),
    params=(
        Param("limit", 0.5, "fraction", f"{RUNS}: with less the loss is that of float32"),
        Param("looks", 10, "looks", "own choice: a hundred steps"),
        Param("turns", 3, "moves", f"{RUNS}: small elements move more often than others"),
        Param("others", 0.75, "of the expected", f"{RUNS}: 0.22 to 0.68 where the loss suffers, from 0.86 elsewhere"),
        Param("asked", 0.5, "fraction", "own choice: rows of an embedding have a gradient now and then"),
    ),
    needs=(LOST, STILL, ASKED, ELEMENTS, "learning_rate.lr"),
    check=check,
    lookback=110,
    hold=2,
    release=2,
    doc=__doc__ or "",
)
