"""Whether the forward computes with parameters that autocast has copied before the last update.

    stale = 1 if a number that was changed after the update is still its old self in the next forward, else 0

Autocast converts each parameter once and keeps the copy until the outermost ``with`` is left, even if that one is not
enabled. Recorded where an optimizer makes its update inside one and the forward is in one that is enabled. Absent where
autocast is left before the update, as it should be, and without it.

Healthy: 0: it is left, and entered again for the next batch.

Unhealthy: 1: one ``with torch.autocast(…)`` around the whole loop. The optimizer moves the parameters, and every
forward goes on with those of the first step: nothing is learnt, in evaluations neither.

Source: definition; torch.autocast, cache_enabled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import recorded


def compute(block: Block) -> Mapping[str, Result]:
    """The number as it was recorded."""
    return {"stale": recorded(block, "stale")}


def oracle() -> Iterable[Case]:
    """Stale; not; not recorded."""
    seen = {"stale": [[1], [0], [None], [nan]]}
    yield Case(seen, seen, "recorded values pass unchanged")


METRIC = Metric(
    id="autocast_cache",
    title="Copies that autocast keeps",
    site="parameter",
    columns=(Column("stale", "1", "1 if the forward computes with old parameters"),),
    compute=compute,
    source="definition",
    cost="two products of one number on the host every 10 steps, where an update is made inside autocast; else nothing",
    plot=Plot("stale"),
    oracle=oracle,
    reads="autocast",
    doc=__doc__ or "",
)
