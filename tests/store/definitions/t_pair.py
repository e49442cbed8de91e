"""Two values of each module, as recorded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from monitor.metric import Array, Block, Case, Column, Metric, Plot


def _compute(b: Block) -> Mapping[str, Array | tuple[Array, object]]:
    return {name: (b[name], b.has(name)) for name in ("a", "b")}


def _oracle() -> Iterator[Case]:
    yield Case({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 2.0}, "as recorded")


METRIC = Metric(
    id="t_pair",
    title="a pair",
    site="gradient",
    columns=(Column("a", "1", "the first"), Column("b", "1", "the second")),
    compute=_compute,  # pyright: ignore[reportArgumentType]
    source="definition",
    cost="nothing",
    plot=Plot("a", kind="heatmap"),
    oracle=_oracle,
    reads="pair",
    doc=__doc__ or "",
)
