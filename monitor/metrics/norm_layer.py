"""What every normalisation layer over features is given, and its gain.

    rms = mean_t rms(x_t),   max_rms = max_t rms(x_t),   peak = max_t rms(x_t) / median_t rms(x_t)
    nonlinearity = std_t σ_t / mean_t σ_t,   first_ratio = mean of σ at position 0 / mean of σ elsewhere
    gain_min, gain_median, gain_max = smallest, median and largest |γ|

over all tokens t of the layer's first call in a step that is trained on. σ_t is what the layer divides by: the token's
standard deviation (LayerNorm) or root mean square (RMSNorm); nonlinearity leaves out position 0 of every sequence (of
dimension 1). γ is what the layer multiplies by, which is one plus its parameter in some models. A layer without a
parameter has no gain; an input without sequences has no first_ratio.

Healthy: rms growing slowly with depth and time; peak of a few, far larger in large language models, whose first token
is massive; gains that stay near where they were, mostly 1.

Unhealthy: rms growing exponentially: all gradients below the layer shrink by as much. Gains falling towards 0
together, so that the layer passes nothing on. A nonlinearity near 0 is no fault: the layer is nearly linear.

Source: Wortsman et al. (2023), arXiv 2309.14322, sec. 3.4, for the input; Baroni et al. (2025), arXiv 2507.02559, for
σ over positions; Sun et al. (2024), arXiv 2402.17762, for massive first tokens; the columns are ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf, nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import per, recorded


def compute(block: Block) -> Mapping[str, Result]:
    """Ratios of the recorded moments."""
    first, known = per(block, "sigma_first", "sigma_mean")
    return {
        "rms": recorded(block, "rms_mean"),
        "max_rms": recorded(block, "rms_max"),
        "peak": per(block, "rms_max", "rms_median"),
        "nonlinearity": per(block, "sigma_std", "sigma_mean"),
        "first_ratio": (first, known & block.has("firsts") & (block["firsts"] != 0)),
        "gain_min": recorded(block, "gain_min"),
        "gain_median": recorded(block, "gain_median"),
        "gain_max": recorded(block, "gain_max"),
        "tokens": recorded(block, "tokens"),
    }


def oracle() -> Iterable[Case]:
    """Tokens of the sizes 1, 1, 1, 5; equal tokens without sequences; zeros; NaN; a layer without a gain."""
    yield Case(
        {
            "rms_mean": [[2], [3], [0], [nan], [1]],
            "rms_max": [[5], [3], [0], [nan], [inf]],
            "rms_median": [[1], [3], [0], [nan], [1]],
            "sigma_mean": [[1], [3], [0], [nan], [1]],
            "sigma_std": [[0.25], [0], [0], [nan], [2]],
            "sigma_first": [[5], [0], [0], [nan], [3]],
            "firsts": [[1], [0], [2], [1], [1]],
            "tokens": [[4], [8], [8], [8], [2]],
            "gain_min": [[0.5], [1], [0], [nan], [None]],
            "gain_median": [[1], [1], [0], [nan], [None]],
            "gain_max": [[2], [1], [0], [nan], [None]],
        },
        {
            "rms": [[2], [3], [0], [nan], [1]],
            "max_rms": [[5], [3], [0], [nan], [inf]],
            "peak": [[5], [1], [None], [nan], [inf]],
            "nonlinearity": [[0.25], [0], [None], [nan], [2]],
            "first_ratio": [[5], [None], [None], [nan], [3]],
            "gain_min": [[0.5], [1], [0], [nan], [None]],
            "gain_median": [[1], [1], [0], [nan], [None]],
            "gain_max": [[2], [1], [0], [nan], [None]],
            "tokens": [[4], [8], [8], [8], [2]],
        },
        "5 over the median 1; a constant σ makes the layer linear; of an input of zeros there is no ratio",
        modules=("ln_f",),
    )


METRIC = Metric(
    id="norm_layer",
    title="Normalisation layers",
    site="activation",
    columns=(
        Column("rms", "1", "mean root mean square of a token of the input"),
        Column("max_rms", "1", "largest root mean square of a token"),
        Column("peak", "1", "largest over median root mean square of a token"),
        Column("nonlinearity", "1", "standard deviation over mean of what the layer divides by"),
        Column("first_ratio", "1", "what the layer divides first positions by, over the mean elsewhere"),
        Column("gain_min", "1", "smallest magnitude of the gain"),
        Column("gain_median", "1", "median magnitude of the gain"),
        Column("gain_max", "1", "largest magnitude of the gain"),
        Column("tokens", "count", "tokens that were read"),
    ),
    compute=compute,
    source="definition; arXiv 2309.14322 sec. 3.4; arXiv 2507.02559",
    cost="one read of every layer's input, two of a LayerNorm's, at every fiftieth step and at 3, 10 and 25",
    plot=Plot("rms", log=True, kind="heatmap"),
    oracle=oracle,
    reads="norm",
    doc=__doc__ or "",
)
