"""Whether the batches hold the classes that the training data hold, or a few of them each.

    within = Σ_c n_c (n_c − 1) / (n (n − 1)),   pooled = Σ_c p_c²,   excess = (mean_within − pooled) / (1 − pooled)

``within`` is the chance that two labels of one batch are the same: n_c labels of class c, n in all, over all
micro-batches of the step. ``mean_within`` is its mean, and p the mean share of each class, over the last looks, each of
which weighs 2 % less than the one after it. The excess is the part of the variety of labels that lies between batches
and not inside them (the fixation index F_ST of population genetics). Of integer labels of rows, at most 1,024 classes
(of a binary cross-entropy: of targets above and below 0.5); not of pixels. A step with a single label says nothing.

Healthy: an excess near 0, whatever the sizes of the classes; a little below where a sampler balances each batch, up to
0.25 where it puts several rows of a few classes together on purpose.

Unhealthy: near 1: every batch is of one class, and the next ones of another. A folder of classes is read in its order.

Source: definition; Wright (1951), The genetical structure of populations, for F_ST.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import nan

import numpy as np

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import recorded


def compute(block: Block) -> Mapping[str, Result]:
    """Chances as they were recorded, and how far they differ."""
    mean, pooled = block["mean_within"], block["pooled"]
    has = block.has("mean_within") & block.has("pooled") & (pooled != 1)
    excess = np.divide(mean - pooled, 1 - pooled, out=np.full(mean.shape, np.nan), where=has)
    several = block.has("within") & block.has("labels") & ~(block["labels"] < 2)
    found: dict[str, Result] = {name: recorded(block, name) for name in ("mean_within", "pooled", "labels", "looks")}
    return found | {
        "within": (np.where(np.isnan(block["labels"]), np.nan, block["within"]), several),
        "excess": (excess, has),
    }


def oracle() -> Iterable[Case]:
    """Batches of one class of two, batches of both, and one class alone."""
    within = [[1], [0.5], [1], [nan], [None]]
    pooled = [[0.5], [0.5], [1], [nan], [None]]
    labels = [[32], [32], [1], [nan], [None]]
    looks = [[20], [20], [20], [nan], [None]]
    yield Case(
        {"within": within, "mean_within": within, "pooled": pooled, "labels": labels, "looks": looks},
        {
            "within": [[1], [0.5], [None], [nan], [None]],
            "mean_within": within,
            "pooled": pooled,
            "labels": labels,
            "looks": looks,
            "excess": [[1], [0], [None], [nan], [None]],
        },
        "by hand; where there is one class there is no variety to divide, and a single label is like no other",
    )


METRIC = Metric(
    id="label_mixing",
    title="Mixing of labels",
    site="input",
    columns=(
        Column("within", "fraction", "chance that two labels of the step's batch are the same"),
        Column("mean_within", "fraction", "mean of it over the last looks"),
        Column("pooled", "fraction", "chance that two labels of different looks are the same"),
        Column("excess", "1", "part of the variety of labels that lies between batches"),
        Column("labels", "count", "labels looked at in the step"),
        Column("looks", "count", "looks so far"),
    ),
    compute=compute,
    source="definition; Wright (1951) for the excess",
    cost="every 20 steps one read of at most 4,096 labels",
    plot=Plot("excess"),
    oracle=oracle,
    reads="labels",
    doc=__doc__ or "",
)
