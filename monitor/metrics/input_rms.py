"""Size of what goes into the model, and a fingerprint that recognises a batch.

    rms = sqrt(Σ x² / n),   max_abs = max |x|,   nonfinite = number of NaN and infinite elements

over all elements of one tensor argument of the root model, all micro-batches of the step together. Integer inputs
(token ids) have only the fingerprint: a hash below 2^24 of 1,024 evenly spaced elements.

Healthy: rms the same from batch to batch within tens of per cent, near 1 for normalised data; nonfinite 0;
fingerprints that differ, or repeat with the period of a full-batch or small data set.

Unhealthy: rms or max_abs jumping by an order of magnitude (a missing normalisation, a corrupt record) just before
loss and gradients jump; any nonfinite element; one fingerprint for ever, where the loader is meant to shuffle.

Source: definition.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf, nan

import numpy as np

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import among, per, recorded


def compute(block: Block) -> Mapping[str, Result]:
    """Root mean square, extremes and fingerprint of every input."""
    mean_square, has = per(block, "sumsq", "n")
    return {
        "rms": (np.sqrt(mean_square), has),
        "max_abs": among(block, "max_abs", "n"),
        "nonfinite": recorded(block, "nonfinite"),
        "fingerprint": recorded(block, "fingerprint"),
    }


def oracle() -> Iterable[Case]:
    """Inputs small enough to do by hand."""
    yield Case(
        {
            "n": [[2], [2], [0], [None], [4]],
            "sumsq": [[25], [nan], [0], [None], [inf]],
            "max_abs": [[4], [nan], [0], [None], [inf]],
            "nonfinite": [[0], [1], [0], [None], [2]],
            "fingerprint": [[7], [8], [0], [16777215], [9]],
        },
        {
            "rms": [[3.5355339], [nan], [None], [None], [inf]],
            "max_abs": [[4], [nan], [None], [None], [inf]],
            "nonfinite": [[0], [1], [0], [None], [2]],
            "fingerprint": [[7], [8], [0], [16777215], [9]],
        },
        "x = (3, 4): sqrt(25/2); a NaN; an empty tensor has no rms; an integer input has only a fingerprint; two inf",
        modules=("input[0]",),
    )


METRIC = Metric(
    id="input_rms",
    title="Input size",
    site="input",
    columns=(
        Column("rms", "1", "root mean square of the elements"),
        Column("max_abs", "1", "largest absolute value"),
        Column("nonfinite", "count", "elements that are NaN or infinite"),
        Column("fingerprint", "hash", "hash of 1,024 evenly spaced elements, below 2^24"),
    ),
    compute=compute,
    source="definition",
    cost="two reads of the input",
    plot=Plot("rms", log=True),
    oracle=oracle,
    reads="input",
    doc=__doc__ or "",
)
