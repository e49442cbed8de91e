"""How often the model is right on the batch it is about to learn from, and how sure it is.

    accuracy = (1/N) #{i : argmax_k p_ik = y_i},   top1_mass = (1/N) Σ_i max_k p_ik

over the N rows looked up (``rows``: where autograd's saved log-probabilities may be read, all that count, or evenly
spaced ones of more than 4 million log-probabilities; otherwise a seeded sample), before the update of the step and in
training mode (dropout, augmentation). Of several largest probabilities the first is the choice, as torch's argmax has
it: a head of zeros is right where the class is 0.

Healthy: both rise together; top1_mass near accuracy.

Unhealthy: accuracy at 1 while `logit_norm` goes on growing (see `softmax_collapse_frac`); top1_mass far above
accuracy (confidently wrong); a drop together with a jump of the loss.

Source: definition; the difference of the two is the calibration gap of Guo et al. (2017).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import per, recorded


def compute(block: Block) -> Mapping[str, Result]:
    """Shares of the rows looked up; runs of version 0.1 looked at all that counted."""
    rows = "looked" if "looked" in block else "n"
    return {
        "accuracy": per(block, "correct", rows),
        "top1_mass": per(block, "sum_top1", rows),
        "rows": recorded(block, rows),
    }


def oracle() -> Iterable[Case]:
    """Counts by hand."""
    yield Case(
        {"looked": [[8], [8], [0], [2]], "correct": [[6], [0], [0], [nan]], "sum_top1": [[5], [2], [0], [nan]]},
        {
            "accuracy": [[0.75], [0], [None], [nan]],
            "top1_mass": [[0.625], [0.25], [None], [nan]],
            "rows": [[8], [8], [0], [2]],
        },
        "6 of 8 right; none of 8 right is 0, none of 0 is absent",
        modules=("cross_entropy",),
    )


METRIC = Metric(
    id="train_accuracy",
    title="Training accuracy",
    site="loss",
    columns=(
        Column("accuracy", "fraction", "rows whose class has the largest probability"),
        Column("top1_mass", "fraction", "mean largest probability"),
        Column("rows", "count", "rows looked up"),
    ),
    compute=compute,
    source="definition",
    cost="shared with loss_zero_frac: one read of the log-probabilities that autograd saved",
    plot=Plot("accuracy"),
    oracle=oracle,
    reads="loss_rows",
    doc=__doc__ or "",
)
