"""One value of the whole run, as recorded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from monitor.metric import Block, Case, Column, Metric, Plot, Result


def _compute(b: Block) -> Mapping[str, Result]:
    return {"value": (b["value"][:, 0], b.has("value")[:, 0])}


def _oracle() -> Iterator[Case]:
    yield Case({"value": 1.0}, {"value": 1.0}, "as recorded")


METRIC = Metric(
    id="t_whole",
    title="one value",
    site="loss",
    columns=(Column("value", "1", "the value"),),
    compute=_compute,
    source="definition",
    cost="nothing",
    plot=Plot("value"),
    oracle=_oracle,
    reads="whole",
    doc=__doc__ or "",
)
