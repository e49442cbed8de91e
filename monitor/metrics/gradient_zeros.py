"""Share of a gradient that is exactly 0, and share of the rest that is as small as any: underflow in float16.

    zero = elements that are 0 / elements looked at
    coarse = elements up to 1.5 times as large as the smallest that is not 0 / elements that are not 0
    least = size of that smallest one

per parameter, after unscaling and clipping, over all elements of a small one and a fixed block in sixteen of a large
one. Recorded where float16 is in use: under ``autocast``, in parameters, or where a ``GradScaler`` is. What is below
2^-25 = 3e-8 becomes 0 in float16, and what is just above it 2^-24: where that happens, many elements have the very
same smallest size, while of numbers that are not rounded so no two do.

Healthy: coarse one or a few elements; zero whatever activations that are 0 and rows that were not used make of it.

Unhealthy: coarse above a few per cent, with a least of 6e-8 over the loss scale: at least half as many elements have
become 0 by rounding, and most of what is left has one or two bits.

Source: Micikevicius et al. (2018), Mixed Precision Training, sec. 3.2; IEEE 754 binary16.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf, nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import among, per, recorded


def compute(block: Block) -> Mapping[str, Result]:
    """Two shares, a size and two counts."""
    rest, has = per(block, "rest", "n")
    return {
        "zero": (1 - rest, has),
        "coarse": per(block, "coarse", "rest"),
        "least": among(block, "least", "rest"),
        "looked": recorded(block, "n"),
        "elements": recorded(block, "elements"),
    }


def oracle() -> Iterable[Case]:
    """Half is 0 and a quarter of the rest one grain of float16; all is 0; nothing looked at; NaN; not recorded."""
    yield Case(
        {
            "n": [[8], [8], [0], [8], [None]],
            "rest": [[4], [0], [0], [nan], [None]],
            "least": [[2.0**-24], [inf], [inf], [nan], [None]],
            "coarse": [[1], [0], [0], [nan], [None]],
            "elements": [[128], [8], [0], [8], [None]],
        },
        {
            "zero": [[0.5], [1], [None], [nan], [None]],
            "coarse": [[0.25], [None], [None], [nan], [None]],
            "least": [[2.0**-24], [None], [None], [nan], [None]],
            "looked": [[8], [8], [0], [8], [None]],
            "elements": [[128], [8], [0], [8], [None]],
        },
        "of a gradient of zeros there is no smallest element",
        modules=("weight",),
    )


METRIC = Metric(
    id="gradient_zeros",
    title="Zeros in gradients of float16",
    site="gradient",
    columns=(
        Column("zero", "fraction", "elements that are exactly 0"),
        Column("coarse", "fraction", "elements as small as any, of those that are not 0"),
        Column("least", "1", "smallest size of an element that is not 0"),
        Column("looked", "count", "elements looked at"),
        Column("elements", "count", "elements of the parameter"),
    ),
    compute=compute,
    source="arXiv 1710.03740 sec. 3.2",
    cost="where float16 is in use, a sixteenth of every gradient every 10 steps; else nothing",
    plot=Plot("coarse", kind="heatmap"),
    oracle=oracle,
    reads="underflow",
    doc=__doc__ or "",
)
