"""How much of an update's gradient an earlier update had been made with already.

    share = ‖g_left‖ / ‖g‖    g_left: the gradient the update before left behind, g: the one after the last backward

0 wherever the gradient was put back to zero, or to None, before a backward added to it. More than 0 only if all of this
was seen: every backward since this optimizer's update before found the gradient untouched, one of them has changed it,
and the update was made with the result, times a number at most (clipping, loss scale). With no backward at all, 1 if
the gradient is the very one of the update before, bit for bit, else 0. Of up to 64 evenly spaced elements of three
gradients (the first parameter's, the last's and one between), at the first ten updates of an optimizer and then at
every 31st. Sparse gradients, and those whose elements do not lie one after another, are passed over.

Healthy: 0, with one backward for each micro-batch.

Unhealthy: near 1 with backwards 1: nobody calls ``zero_grad()``, and each update is made with the sum of all gradients
so far. 1 with backwards 0: ``step()`` is called twice for one backward.

Source: definition.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import per, recorded


def compute(block: Block) -> Mapping[str, Result]:
    """The share, and what it was taken over."""
    return {
        "share": per(block, "left", "norm"),
        "backwards": recorded(block, "backwards"),
        "elements": recorded(block, "n"),
    }


def oracle() -> Iterable[Case]:
    """Put back to zero; the half of it left over; a gradient of 0; not recorded; NaN."""
    yield Case(
        {
            "left": [[0], [1], [0], [None], [0]],
            "norm": [[3], [2], [0], [None], [nan]],
            "backwards": [[1], [4], [1], [None], [1]],
            "n": [[192], [192], [10], [None], [5]],
        },
        {
            "share": [[0], [0.5], [None], [None], [nan]],
            "backwards": [[1], [4], [1], [None], [1]],
            "elements": [[192], [192], [10], [None], [5]],
        },
        "1 of 2; nothing is no share of nothing",
    )


METRIC = Metric(
    id="gradient_reuse",
    title="Gradient used before",
    site="gradient",
    columns=(
        Column("share", "1", "norm of what was left of earlier updates' gradients, over that of the gradient"),
        Column("backwards", "count", "calls of backward since the optimizer's update before"),
        Column("elements", "count", "elements of the gradient that were read"),
    ),
    compute=compute,
    source="definition",
    cost="192 elements of three gradients after every 31st update; before a backward whether they are still there",
    plot=Plot("share"),
    oracle=oracle,
    reads="gradient_reuse",
    doc=__doc__ or "",
)
