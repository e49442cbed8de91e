"""What the rules on routers share: which steps of a router can be judged, and its size beside the judged column."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from monitor.metric import Array, Mask
from monitor.rule import Param, Window
from monitor.rules._series import Steps, latest

#: Digits through two layers of 4 to 32 experts, 400 steps, two seeds; provoked by a router that learns 10 or 30 times
#: faster, a learning rate of 0.03 without a balancing term, or a balancing term of the wrong sign.
TRAININGS = "40 small MoE trainings"

#: When a router is judged.
SETTLED = (
    Param("settle", 50, "steps", "own choice: no router is balanced at first"),
    Param("assignments", 4, "per expert", "own choice: with fewer, chance alone empties experts"),
)


@dataclass(frozen=True)
class Routers:
    """One column of router_balance over the judged steps; every array is ``(step, module)``.

    Attributes:
        steps: ``(step,)``.
        modules: the routers.
        value: the column.
        has: where it was recorded and can be judged.
        experts, k, tokens: of the router.
        more: other columns at the same steps.
    """

    steps: Steps
    modules: tuple[str, ...]
    value: Array
    has: Mask
    experts: Array
    k: Array
    tokens: Array
    more: Mapping[str, Array]


def needs(column: str, *more: str) -> tuple[str, ...]:
    """What `routers` reads."""
    return tuple(f"router_balance.{name}" for name in (column, "experts", "top_k", "tokens", *more))


def routers(window: Window, p: Mapping[str, float], column: str, *more: str) -> Routers:
    """The column and what it is judged by, where the router has settled and chosen often enough."""
    ref = f"router_balance.{column}"
    block = window[ref]
    start = int(np.searchsorted(block.steps, window.first))
    steps, modules = block.steps[start:], block.modules
    value, has = block[ref][start:], block.has(ref)[start:]
    experts, k, tokens, *others = (
        latest(window[f"router_balance.{name}"], steps, modules)[0] for name in ("experts", "top_k", "tokens", *more)
    )
    with np.errstate(invalid="ignore"):
        enough = (steps >= p["settle"])[:, None] & (k * tokens >= p["assignments"] * experts) & (k < experts)
    has = has & enough & ~np.isnan(value)
    return Routers(steps, modules, value, has, experts, k, tokens, dict(zip(more, others, strict=True)))
