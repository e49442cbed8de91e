"""Size of the whole gradient, as the optimizer used it.

    norm = sqrt(Σ_l ‖g_l‖²),   max_abs = max_l max |g_l|,   nonfinite = Σ_l nonfinite_l

over all parameters that had a gradient in the step. After unscaling and clipping: with clipping it cannot exceed the
threshold, and the norm before is this divided by the coefficient in `clip`. The largest element is known where that
of every parameter is (`grad_norm`; with large parameters at every tenth step), or one is not finite. On an accelerator
it is known at every eighth step, and ``nonfinite`` counts parameters with such elements.

Healthy: falls or levels off; noise of tens of per cent between batches.

Unhealthy: NaN or inf; several times its recent values (a spike), or growing over hundreds of steps while the loss
does not fall (towards divergence); 0 (nothing is learned any more).

Source: definition; the same number that ``torch.nn.utils.clip_grad_norm_`` returns when it does not clip.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf, nan

import numpy as np

from monitor.metric import Array, Block, Case, Column, Mask, Metric, Plot, Result


def compute(block: Block) -> Mapping[str, Result]:
    """The columns over all parameters; float64 holds the squares of every float32."""

    def over(name: str) -> tuple[Array, Mask]:
        has = block.has(name)
        return np.where(has, block[name], 0.0), np.logical_or.reduce(has, axis=1)

    norms, has_norm = over("norm")
    peaks, has_peak = over("max_abs")
    bad, has_bad = over("nonfinite")
    # the largest of some is a bound of the largest of all, unless it is NaN or inf
    complete = (block.has("max_abs") | ~block.has("norm")).all(axis=1)
    largest = peaks.max(axis=1, initial=0.0)
    return {
        "norm": (np.sqrt(np.square(norms).sum(axis=1)), has_norm),
        "max_abs": (largest, has_peak & (complete | ~np.isfinite(largest))),
        "nonfinite": (bad.sum(axis=1), has_bad),
    }


def oracle() -> Iterable[Case]:
    """Two parameters: 3-4-5, near both ends of float32, one without a gradient, none with one, NaN and inf.

    Then a step in which the second was not looked at closely, and one in which the first was found infinite.
    """
    yield Case(
        {
            "norm": [
                [3, 4], [1e38, 1e38], [1e-38, 1e-38], [5, None], [None, None], [nan, 1], [inf, 1], [3, 4], [inf, 1],
            ],
            "max_abs": [
                [3, 2], [1e38, 1e37], [1e-38, 1e-39], [5, None], [None, None], [nan, 1], [inf, 1], [3, None],
                [inf, None],
            ],
            "nonfinite": [[0, 0], [0, 0], [0, 0], [0, None], [None, None], [2, 0], [1, 3], [0, 0], [1, 0]],
        },
        {
            "norm": [5, 1.41421356e38, 1.41421356e-38, 5, None, nan, inf, 5, inf],
            "max_abs": [3, 1e38, 1e-38, 5, None, nan, inf, None, inf],
            "nonfinite": [0, 0, 0, 0, None, 2, 4, 0, 1],
        },
        "sqrt 2 times 1e±38 neither overflows nor vanishes; a step without any gradient is absent",
        modules=("a", "b"),
    )  # fmt: skip


METRIC = Metric(
    id="grad_norm_total",
    title="Gradient norm",
    site="gradient",
    columns=(
        Column("norm", "1", "ℓ2 norm over all parameters"),
        Column("nonfinite", "count", "elements that are NaN or infinite"),
        Column("max_abs", "1", "largest absolute value of an element"),
    ),
    compute=compute,
    source="definition",
    cost="nothing beyond grad_norm",
    plot=Plot("norm", log=True),
    oracle=oracle,
    reads="gradient",
    doc=__doc__ or "",
)
