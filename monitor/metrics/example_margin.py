"""How many examples have a label that contradicts what is learned from the others.

    margin of a visit = logit of the label − largest other logit
    AUM of an example = mean of its margins over all visits so far
    negative = share of the examples with 4 visits and more whose AUM is below 0

An example is recognised by what is in it (`monitor.remedies.fingerprints`), without augmentation and for up to 262,144
examples; or by its id, if `handle.note(ids)` names those of each batch. The table `examples` has all of them, the least
AUM first. Of several losses the first with one class a row counts, with up to 1,000 classes. Of several processes only
the examples of the first are seen.

Healthy: falls towards 0, within a few visits where the task is easy.

Unhealthy: stays at a level for long: about that share of the labels is wrong, or cannot be told from the input. On
digits with 5, 10, 20 and 40 % of the labels replaced the share was 8, 13, 22 and 43 % after six visits, and 9 in 10 of
the tenth with the least AUM were wrong labels. Later they are learned by heart. Where `whole` is near 1 the negative
ones are whole classes: too few examples of them, rather than wrong labels.

Source: Pleiss et al. (2020), Identifying mislabeled data using the area under the margin ranking, arXiv 2001.10528, eq.
1, for the AUM; the share of negative ones is ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import recorded


def compute(block: Block) -> Mapping[str, Result]:
    """All columns as they were recorded."""
    return {c.name: recorded(block, c.name) for c in METRIC.columns}


def oracle() -> Iterable[Case]:
    """Ten per cent of 1,200 examples; none; nothing known of earlier visits."""
    stats = {
        "negative": [[0.1], [0], [0.3], [None]],
        "earlier": [[0.11], [0], [nan], [None]],
        "whole": [[0.02], [0], [1], [None]],
        "visits": [[6.5], [40], [4], [None]],
        "examples": [[1200], [60], [1], [None]],
    }
    yield Case(stats, stats, "recorded values pass unchanged")


METRIC = Metric(
    id="example_margin",
    title="Examples with a negative margin",
    site="logits",
    columns=(
        Column("negative", "fraction", "examples whose mean margin is below 0"),
        Column("earlier", "fraction", "the same after two thirds as many visits"),
        Column("whole", "fraction", "of those, the ones of labels most of whose examples are below 0"),
        Column("visits", "count", "mean number of visits of an example"),
        Column("examples", "count", "examples with at least 4 visits"),
    ),
    compute=compute,
    source="arXiv 2001.10528",
    cost="1,024 elements of every row of the input and a read of the logits, at every fifth step, on an accelerator "
    "every 20th, with noted ids every step; 40 bytes and an entry of a dictionary for each example",
    plot=Plot("negative"),
    oracle=oracle,
    reads="example",
    doc=__doc__ or "",
)
