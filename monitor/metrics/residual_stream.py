"""The residual stream of a model of repeated blocks, as it leaves each block.

    rms = sqrt(mean x²),   max_abs = max |x|,   nonfinite = NaN and infinite elements       over all tokens
    kurtosis = mean (x − mean x)⁴ / (mean (x − mean x)²)²,   peak = max_abs / median |x|    over ``rows`` sampled tokens
    massive = channels whose largest |x| exceeds 100 and 1,000 times that median

of a block's output in the first forward of a step that is trained on. Blocks are children of one list that have a class
in common and are handed each other's outputs; a model without such has no residual stream here.

Healthy: rms grows over the blocks, by a small factor at the start of training, and over the steps until the learning
rate falls; kurtosis is near 3 where nothing stands out and far larger in trained language models, of which the large
ones keep a few massive channels.

Unhealthy: rms or max_abs growing exponentially over the steps, the later blocks first; max_abs near the largest number
of the dtype (65,504 in float16). Growth of the stream shrinks all gradients before the last normalisation by as much.

Source: Sun et al. (2024), Massive Activations in Large Language Models, arXiv 2402.17762, sec. 2, for massive channels;
Wortsman et al. (2023), arXiv 2309.14322, sec. 3.4, for what growth does to gradients; the rest by definition.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf, nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import among, per, recorded


def compute(block: Block) -> Mapping[str, Result]:
    """The statistics as they were recorded, and the ratio of the largest magnitude to the median one."""
    return {
        "rms": recorded(block, "rms"),
        "max_abs": recorded(block, "max_abs"),
        "kurtosis": among(block, "kurtosis", "std"),
        "peak": per(block, "max_abs", "median"),
        "massive": recorded(block, "massive"),
        "nonfinite": recorded(block, "nonfinite"),
        "rows": recorded(block, "rows"),
    }


def oracle() -> Iterable[Case]:
    """A flat output, one with an outlier, a constant one, one with NaN, one not recorded."""
    yield Case(
        {
            "rms": [[1], [3], [2], [nan], [None]],
            "max_abs": [[4], [2000], [2], [inf], [None]],
            "std": [[1], [3], [0], [nan], [None]],
            "kurtosis": [[3], [900], [nan], [nan], [None]],
            "median": [[0.5], [1], [2], [nan], [None]],
            "massive": [[0], [1], [0], [0], [None]],
            "nonfinite": [[0], [0], [0], [7], [None]],
            "rows": [[64], [64], [9], [64], [None]],
        },
        {
            "rms": [[1], [3], [2], [nan], [None]],
            "max_abs": [[4], [2000], [2], [inf], [None]],
            "kurtosis": [[3], [900], [None], [nan], [None]],
            "peak": [[8], [2000], [1], [nan], [None]],
            "massive": [[0], [1], [0], [0], [None]],
            "nonfinite": [[0], [0], [0], [7], [None]],
            "rows": [[64], [64], [9], [64], [None]],
        },
        "4 / 0.5 and 2000 / 1; without spread there is no kurtosis; NaN stays",
        modules=("h.0",),
    )


METRIC = Metric(
    id="residual_stream",
    title="Residual stream",
    site="activation",
    columns=(
        Column("rms", "1", "root mean square of the block's output"),
        Column("max_abs", "1", "largest magnitude"),
        Column("kurtosis", "1", "fourth central moment over the squared variance; 3 for a normal distribution"),
        Column("peak", "1", "largest magnitude over the median magnitude"),
        Column("massive", "count", "channels beyond 100 and 1,000 times the median magnitude"),
        Column("nonfinite", "count", "elements that are NaN or infinite"),
        Column("rows", "count", "tokens sampled for kurtosis and median"),
    ),
    compute=compute,
    source="definition; arXiv 2402.17762 sec. 2",
    cost="three reads of every block's output, at every fiftieth step and at 3, 10 and 25",
    plot=Plot("rms", log=True, kind="heatmap"),
    oracle=oracle,
    reads="stream",
    doc=__doc__ or "",
)
