"""A router's capacity limit throws tokens away.

What it means:
    The experts of this router are full before all their tokens have arrived, and the layer leaves the rest as they
    are. Those tokens are neither computed nor learned from, and which ones they are depends on the order of the batch.

How it is decided:
    The model's own capacity limit leaves out more than 5 % of the assignments for 20 points, which are 100 steps. It is
    read from the mask that the model makes of it; a model without a limit is never judged, whatever it would drop if it
    had one. The first 50 steps, and steps with fewer than 16 assignments an expert, in which chance alone overfills
    some, are not judged.

What to do:
    Balance the loads (see load_imbalance): then a capacity factor of 1.25 drops next to nothing. Until they are, raise
    the capacity factor, to 2 say, or use a layer without a limit.

When it is wrong:
    Dropping is part of some recipes (expert choice, token dropping as regularisation). Where the capacity is counted in
    each sequence, short sequences are overfilled by chance more often than the numbers of a step say. Padding tokens
    that are left out on purpose count as dropped where the model counts them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._router import needs, routers


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Routers that drop more than a share of their assignments."""
    r = routers(window, p, "dropped", "max_violation")
    evidence = {"experts": r.experts, "top_k": r.k, "largest_load": (r.more["max_violation"] + 1) / r.experts}
    yield Hits(r.steps, r.modules, r.has & (r.value > p["share"]), r.has, r.value, p["share"], evidence)


RULE = Rule(
    id="token_drops",
    title="Tokens dropped",
    severity="warning",
    site="router",
    message="{module} drops {value:.1%} of its assignments; its busiest expert would get {largest_load:.0%} of all.",
    refute="the drops belong to the recipe, or what is left out is padding",
    remedies=(
        Remedy("balance the loads: raise the weight of the load-balancing term (usually 0.01)"),
        Remedy("raise the capacity factor, or use a layer that drops nothing"),
    ),
    params=(
        Param(
            "share", 0.05, "of the assignments",
            "own choice; Fedus et al. (2021), arXiv 2101.03961, sec. 2.2: below 1 % is usual with a balancing term",
        ),
        Param("settle", 50, "steps", "own choice: no router is balanced at first"),
        Param("assignments", 16, "per expert", "closed form: balanced at random, a factor of 1.25 drops 2.1 % then"),
    ),
    needs=needs("dropped", "max_violation"),
    check=check,
    lookback=1,
    hold=20,
    doc=__doc__ or "",
)  # fmt: skip
