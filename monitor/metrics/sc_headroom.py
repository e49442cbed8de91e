"""How far the softmax is from collapse, in nats of logit.

    h_i = ln R_i + p ln 2,   R_i = Σ_{k ≠ argmax} exp(z_ik − max z_i)

5 % and 50 % quantile over the rows read; p is the number of significand bits of the dtype the loss is computed in
(float32 24, float16 11, bfloat16 8). Above 0 the rivals of the first choice still count; at 0 and below, 1 + R rounds
to 1 and the row is collapsed. The quantiles are elements of the sample, not interpolated; those of several
micro-batches are averaged.

Healthy: q50 above 5 and level.

Unhealthy: q50 below ln 64 = 4.16 (the loss of a typical row is within 64 roundings of 0) and falling; below 0 half of
the rows are collapsed. −inf: the rivals' share is 0 even before rounding.

Source: the margin to the rule of `softmax_collapse_frac`; definition and the limit of 64 are ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf, nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import among


def compute(block: Block) -> Mapping[str, Result]:
    """The quantiles as they were recorded."""
    return {"q05": among(block, "headroom_q05", "n"), "q50": among(block, "headroom_q50", "n")}


def oracle() -> Iterable[Case]:
    """Logits (10, 0), R = 4.53999e-5, under float32, float16 and bfloat16; R = 0; no rows; NaN."""
    numbers = [[6.6355], [-2.3754], [-4.4548], [-inf], [nan]]
    stats = {"n": [[1], [1], [1], [1], [1], [0]], "headroom_q05": [*numbers, [0]], "headroom_q50": [*numbers, [0]]}
    yield Case(
        stats,
        {"q05": [*numbers, [None]], "q50": [*numbers, [None]]},
        "ln 4.53999e-5 = −10.0000 plus 24, 11, 8 times ln 2; nothing read is absent",
        modules=("cross_entropy",),
    )


METRIC = Metric(
    id="sc_headroom",
    title="Headroom before softmax collapse",
    site="logits",
    columns=(
        Column("q05", "nats", "5 % quantile over rows"),
        Column("q50", "nats", "median over rows"),
    ),
    compute=compute,
    source="definition, from arXiv 2501.04697 Def. 1",
    cost="shared by all metrics of logits: up to 256 rows, or all of 2^14 logits; every 5 steps, 20 on an accelerator",
    plot=Plot("q50"),
    oracle=oracle,
    reads="logit_rows",
    doc=__doc__ or "",
)
