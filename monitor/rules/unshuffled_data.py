"""Each batch holds one class or a few, while the training data hold many.

What it means:
    The data are read in their order, as a folder of classes is without shuffling, and the order is that of the labels.
    Each batch pulls the model towards its own class, the last class of an epoch wins, and the loss rises and falls with
    the order instead of with what is learned. Batch normalisation sees one class at a time.

How it is decided:
    Over the last looks (`label_mixing`), at least half of the variety of labels lies between batches and not inside
    them: 0 in batches that are drawn at random, 1 in batches of one class each. At 3 looks in a row, from the 20th look
    on, once 100 labels could be compared with another of their batch, and where two labels of different batches differ
    in 20 % of all cases or more. Sizes of classes do not matter.

What to do:
    Shuffle: `DataLoader(..., shuffle=True)`, a random sampler, a larger shuffle buffer for data that are streamed, or
    the files in a random order.

When it is wrong:
    The classes come one after another on purpose, as in continual learning; all rows of a batch are parts of one thing
    with one label; actions of one episode.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._series import exactly

EXCESS, WITHIN, POOLED = "label_mixing.excess", "label_mixing.mean_within", "label_mixing.pooled"
LABELS, LOOKS = "label_mixing.labels", "label_mixing.looks"


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Looks at which the variety of labels lay between batches."""
    block = window[EXCESS]
    value, has = block[EXCESS], block.has(EXCESS)
    within, pooled, labels, looks = (
        exactly(window[ref], block.steps, block.modules)[0] for ref in (WITHIN, POOLED, LABELS, LOOKS)
    )
    has = has & (looks >= p["minimum"]) & (looks * (labels - 1) >= p["pairs"]) & (1 - pooled >= p["variety"])
    evidence = {"inside": 1 / within, "all": 1 / pooled, "labels": np.rint(labels)}
    yield Hits(block.steps, block.modules, has & (value >= p["excess"]), has, value, p["excess"], evidence)


RULE = Rule(
    id="unshuffled_data",
    title="Data not shuffled",
    severity="warning",
    site="input",
    message="Batches of {labels:.0f} labels are as if of {inside:.1f} equal classes, the last thousand steps together "
    "as if of {all:.1f}: {value:.0%} of the variety of labels lies between batches.",
    refute="the first batch, looked at, holds as many classes as the data do",
    remedies=(
        Remedy("shuffle: DataLoader(..., shuffle=True), or a random sampler"),
        Remedy("streamed data: a larger shuffle buffer, files in a random order"),
    ),
    params=(
        Param(
            "excess", 0.5, "of the variety", "between what a policy that becomes sure of one answer can reach (0.44) "
            "and batches of one class each (1)",
        ),
        Param("variety", 0.2, "fraction", "own choice: of one class in nine rows out of ten little can be said"),
        Param("pairs", 100, "labels", "5 standard errors at batches of two labels of two classes"),
        Param("minimum", 20, "points", "own choice"),
    ),
    needs=(EXCESS, WITHIN, POOLED, LABELS, LOOKS),
    check=check,
    lookback=1,
    hold=3,
    release=5,
    doc=__doc__ or "",
)  # fmt: skip
