"""Size of the gradient of every parameter, as the optimizer used it.

    norm = ‖g‖₂,   max_abs = max |g|,   nonfinite = number of NaN and infinite elements

per parameter, after unscaling and clipping, before the update. The norm is right down to elements of 1e-38, where a
plain float32 norm is already 0. On a CPU the largest element of a parameter of more than 8,192 is taken at every
fourth step and at every tenth, and in any step in which its norm is not finite; else it is absent. On an accelerator
it is taken at every eighth step, and non-finite elements are not counted: 1 says that there are some. Without float64,
as on Apple's, a norm below 1e-15 has lost bits.

Healthy: within one or two orders of magnitude over the layers, drifting slowly; noise of tens of per cent between
batches.

Unhealthy: NaN or inf (the first parameter in order of execution is the birthplace); a jump that `grad_norm_z` puts
beyond 6; falling layer by layer towards 0 (vanishing) or rising (exploding); exactly 0 for ever (a dead or unused
parameter).

Source: definition.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf, nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import recorded


def compute(block: Block) -> Mapping[str, Result]:
    """The columns as they were recorded."""
    return {name: recorded(block, name) for name in ("norm", "max_abs", "nonfinite")}


def oracle() -> Iterable[Case]:
    """G = (3, 4); 1,000 elements of 1e-24; a NaN element; no gradient; an infinite element."""
    stats = {
        "norm": [[5, 3.1622777e-23], [nan, None], [inf, 0]],
        "max_abs": [[4, 1e-24], [nan, None], [inf, 0]],
        "nonfinite": [[0, 0], [1, None], [1, 0]],
    }
    yield Case(
        stats,
        stats,
        "recorded values pass unchanged; no gradient is absent, a gradient of zeros is 0",
        modules=("a", "b"),
    )


METRIC = Metric(
    id="grad_norm",
    title="Gradient norm per parameter",
    site="gradient",
    columns=(
        Column("norm", "1", "ℓ2 norm of the gradient"),
        Column("max_abs", "1", "largest absolute value of an element"),
        Column("nonfinite", "count", "elements that are NaN or infinite"),
    ),
    compute=compute,
    source="definition",
    cost="shared by all metrics of gradients: one read of every gradient",
    plot=Plot("norm", log=True, kind="heatmap"),
    oracle=oracle,
    reads="gradient",
    doc=__doc__ or "",
)
