"""How few examples batch normalisation takes its mean and variance over.

    examples = least first dimension of what a batch normalisation in training mode was given,
    samples = least number of values that one mean was taken over: examples times positions (pixels, time steps)

over all of them and all micro-batches of a step. Gradient accumulation does not help: each micro-batch is normalised by
itself. Normalisation over several processes (SyncBatchNorm) and inside compiled regions is not seen.

Healthy: 16 examples and more.

Unhealthy: below 8. The positions of one example are so alike that they hardly count: with 32 examples a ResNet-50 errs
in 23.6 % of ImageNet, with 4 in 27.3 %, with 2 in 34.7 %.

Source: definition; Wu and He (2018), Group Normalization, fig. 1, for the effect.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import recorded


def compute(block: Block) -> Mapping[str, Result]:
    """The counts as they were recorded."""
    return {name: recorded(block, name) for name in ("examples", "samples", "calls")}


def oracle() -> Iterable[Case]:
    """Two images of 8 times 8 in three layers."""
    seen = {
        "examples": [[2], [None], [nan]],
        "samples": [[32], [None], [nan]],
        "calls": [[3], [None], [nan]],
    }
    yield Case(seen, seen, "recorded values pass unchanged")


METRIC = Metric(
    id="batch_norm",
    title="Examples of a batch normalisation",
    site="activation",
    columns=(
        Column("examples", "count", "least number of examples normalised together"),
        Column("samples", "count", "least number of values of a mean: examples times positions"),
        Column("calls", "count", "batch normalisations in training mode"),
    ),
    compute=compute,
    source="definition",
    cost="nothing: shapes, at every twentieth step",
    plot=Plot("examples"),
    oracle=oracle,
    reads="batch_norm",
    doc=__doc__ or "",
)
