"""How unusual the gradient norm of a parameter is for this run: robust standard deviations from its recent past.

    z_t = (‖g_t‖ − median) / max(1.4826 · MAD, 2^-9 · |median|)    over the 100 recorded steps before t, not t itself

per parameter, on the gradient the optimizer used. At least 20 finite norms are needed; before that, and where most of
the past is exactly 0 (an unused expert, a frozen layer), there is no z.

Healthy: between −4 and 4, single values a little beyond: gradient norms are skewed upwards.

Unhealthy: above 6 in many parameters at once, or growing from the last layer to the first: a gradient spike. The
first parameter in order of execution that jumps is where to look; with gradient clipping only the relative pattern
remains.

Source: robust z of a loss or gradient norm over the past 100 points. Floor and minimum are ours: `monitor.robust`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.robust import WINDOW, robust_z


def compute(block: Block) -> Mapping[str, Result]:
    """The z of every norm against the recorded steps before it, per parameter."""
    return {"z": robust_z(block["grad_norm.norm"], block.has("grad_norm.norm"))}


def oracle() -> Iterable[Case]:
    """Two parameters, each with its own baseline."""
    # 19 · k mod 21 runs through 1..20 in another order, so the answer cannot depend on order
    past: list[list[float | None]] = [[float(19 * k % 21), 4.0] for k in range(1, 21)]
    yield Case(
        {"grad_norm.norm": [*past, [10.5 - 2 * 7.413, 4.0 + 12 * 2.0**-7]]},
        {"z": [[None, None]] * 20 + [[-2.0, 12.0]]},
        "1..20: median 10.5, MAD 5; constant 4: scale 4 · 2^-9 = 2^-7",
        modules=("a", "b"),
    )
    yield Case(
        {"grad_norm.norm": [[None, 1.0], *past[:19], [5.0, 5.0]]},
        {"z": [[None, None]] * 20 + [[None, 128.0]]},
        "19 recorded points are too few; an absent point is not one of them (b: (5 − 4) / (4 · 2^-9) = 128)",
        modules=("a", "b"),
    )


METRIC = Metric(
    id="grad_norm_z",
    title="Gradient norm against its recent past",
    site="gradient",
    columns=(Column("z", "robust sigma", "distance of the norm from the median of the steps before"),),
    compute=compute,
    source="definition (robust z over 100 past points)",
    cost="nothing while training: computed from grad_norm.norm",
    plot=Plot("z", kind="heatmap"),
    oracle=oracle,
    needs=("grad_norm.norm",),
    lookback=WINDOW,
    doc=__doc__ or "",
)
