"""Share of a router's assignments that each expert received.

    load_e = n_e / Σ_j n_j

over the tokens of a step that this process saw, a token counting once for each of its k experts. Modules are written
``router[expert]``; balance is load_e = 1/E for each of E experts.

Healthy: every load within a few times 1/E. One or two experts near 0 are common in healthy trainings.

Unhealthy: a few experts with almost everything (see router_balance, which has one number for all experts).

Source: definition; Shazeer et al. (2017), Outrageously Large Neural Networks, arXiv 1701.06538, section 4.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import per


def compute(block: Block) -> Mapping[str, Result]:
    """Assignments of one expert over those of all."""
    return {"load": per(block, "chosen", "assigned")}


def oracle() -> Iterable[Case]:
    """Eight experts of which two get everything; nothing assigned."""
    yield Case(
        {"chosen": [[32, 32, 0], [0, 0, 0], [64, 0, None]], "assigned": [[64, 64, 64], [0, 0, 0], [128, 128, None]]},
        {"load": [[0.5, 0.5, 0], [None, None, None], [0.5, 0, None]]},
        "32 of 64 is a half; of no assignment there is no share",
        modules=("router[0]", "router[1]", "router[7]"),
    )


METRIC = Metric(
    id="router_load",
    title="Expert load",
    site="router",
    columns=(Column("load", "fraction", "share of the router's assignments that this expert received"),),
    compute=compute,
    source="definition",
    cost="shared by all metrics of routers: one read of the chosen experts of all tokens, every 5 steps",
    plot=Plot("load", kind="heatmap"),
    oracle=oracle,
    reads="router_load",
    doc=__doc__ or "",
)
