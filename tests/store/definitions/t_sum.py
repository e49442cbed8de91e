"""Sum of the last four recorded values, a derived metric that looks back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from monitor.metric import Block, Case, Column, Metric, Plot, Result


def _compute(b: Block) -> Mapping[str, Result]:
    total = np.cumsum(b["t_pair.a"], axis=0)
    total[4:] -= total[:-4].copy()
    return {"total": total}


def _oracle() -> Iterator[Case]:
    yield Case({"t_pair.a": [[1.0], [2.0]]}, {"total": [[1.0], [3.0]]}, "by hand")


METRIC = Metric(
    id="t_sum",
    title="a sum",
    site="gradient",
    columns=(Column("total", "1", "the sum"),),
    compute=_compute,
    source="definition",
    cost="nothing",
    plot=Plot("total"),
    oracle=_oracle,
    needs=("t_pair.a",),
    lookback=3,
    doc=__doc__ or "",
)
