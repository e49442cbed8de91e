"""A router has collapsed: it sends nearly every token to the same few experts.

What it means:
    The mixture has become one small network. The chosen experts are the only ones that learn, so they stay the best
    choice, and the others stay as they were: this does not heal by itself.

How it is decided:
    The experts in use, exp(H(loads)), lie between k (each token's number of experts: collapse) and E (balance). They
    are below k + (E − k)/7 for 20 points, which are 100 steps. The first 50 steps, and steps with fewer than 4
    assignments an expert, are not judged. One or more dead experts alone are no fault.

What to do:
    Restart from before the collapse with a load-balancing term (E · Σ f·P, weight 0.01; ten times that if there is one
    already), a lower learning rate for the router and a z-loss on its scores. A bias that follows the loads also helps.

When it is wrong:
    Loads are those of one process; batches of a single narrow domain may rightly use few experts. Distillation into few
    experts, or pruning, does this on purpose.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._router import SETTLED, TRAININGS, needs, routers


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Routers that use hardly more experts than one token does."""
    r = routers(window, p, "effective", "mean_normalised")
    limit = r.k + p["part"] * (r.experts - r.k)
    evidence = {"experts": r.experts, "top_k": r.k, "mean_normalised": r.more["mean_normalised"]}
    yield Hits(r.steps, r.modules, r.has & (r.value < limit), r.has, r.value, limit, evidence)


RULE = Rule(
    id="router_concentration",
    title="Router collapse",
    severity="warning",
    site="router",
    message="{module} uses {value:.3g} of its {experts:.0f} experts, with {top_k:.0f} a token.",
    refute="other processes, or other data, use other experts",
    remedies=(
        Remedy("go back to before the collapse and raise the weight of the load-balancing term two- to tenfold"),
        Remedy("halve the router's learning rate"),
        Remedy("add z_loss(scores, coefficient=1e-3) to the loss", "monitor.remedies.z_loss"),
    ),
    params=(
        Param(
            "part", 1 / 7, "of the way from k to E",
            f"a quarter of E at E = 8, k = 1; of {TRAININGS} 24 usual ones stay above, 7 of 16 provoked fire",
        ),
        *SETTLED,
    ),
    needs=needs("effective", "mean_normalised"),
    check=check,
    lookback=1,
    hold=20,
    doc=__doc__ or "",
)  # fmt: skip
