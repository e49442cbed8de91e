"""Share of a parameter's elements that an update could not change: what 16 bits lose in rounding.

    frac = elements that the update left as they were / elements whose gradient is not 0
    still = elements that have the value they had a hundred steps before / elements whose gradient is not 0
    asked = elements whose gradient is not 0 / elements looked at

per parameter of 16 bits (bfloat16, float16) that the optimizer itself updates, over all elements of a small one and a
fixed block in sixteen of a large one. Between two neighbouring bfloat16 numbers lies 1/256 to 1/128 of their size: an
update of less than half of that is rounded away, and so is the next one. Absent for parameters of more bits: master
weights in float32, ``autocast``.

Healthy: a large frac with a small still: rounded at random, or with the error carried on, elements move rarely but each
does in its turn, and the mean is right. With a large learning rate frac itself is small.

Unhealthy: frac and still both large for long: the training asks, and it is always the same elements that move. Norm
gains, which begin at 1, are the first to rest, and small weights the last; weight decay is lost if learning rate times
decay is below 1/512.

Source: definition; IEEE 754 rounding to nearest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import per, recorded


def compute(block: Block) -> Mapping[str, Result]:
    """Three shares and two counts."""
    return {
        "frac": per(block, "lost", "asked"),
        "still": per(block, "still", "asked"),
        "asked": per(block, "asked", "n"),
        "looked": recorded(block, "n"),
        "elements": recorded(block, "elements"),
    }


def oracle() -> Iterable[Case]:
    """A quarter of the gradients are 0; all are; nothing was looked at; NaN; not recorded."""
    yield Case(
        {
            "n": [[8], [8], [0], [8], [None]],
            "asked": [[6], [0], [0], [nan], [None]],
            "lost": [[3], [0], [0], [0], [None]],
            "still": [[1.5], [0], [0], [0], [None]],
            "elements": [[128], [8], [0], [8], [None]],
        },
        {
            "frac": [[0.5], [None], [None], [nan], [None]],
            "still": [[0.25], [None], [None], [nan], [None]],
            "asked": [[0.75], [0], [None], [nan], [None]],
            "looked": [[8], [8], [0], [8], [None]],
            "elements": [[128], [8], [0], [8], [None]],
        },
        "3 of 6 left as they were; where no element was asked to move there is no share",
        modules=("weight",),
    )


METRIC = Metric(
    id="lost_updates",
    title="Updates lost to rounding",
    site="update",
    columns=(
        Column("frac", "fraction", "elements left as they were, of those with a gradient"),
        Column("still", "fraction", "elements that are as they were 100 steps before, of those with a gradient"),
        Column("asked", "fraction", "elements whose gradient is not 0"),
        Column("looked", "count", "elements looked at"),
        Column("elements", "count", "elements of the parameter"),
    ),
    compute=compute,
    source="definition",
    cost="of parameters of 16 bits a sixteenth is read every 10 steps, with its gradient and a copy; else nothing",
    plot=Plot("frac", kind="heatmap"),
    oracle=oracle,
    reads="rounding",
    doc=__doc__ or "",
)
