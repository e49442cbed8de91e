"""Share of rows whose loss is exactly 0, as the user's own kernel computed it.

    frac = (1/N) #{i : ℓ_i = 0},   ℓ_i the unreduced cross-entropy in the dtype it was computed in

over the N rows that count (``rows``: all of them where autograd's saved log-probabilities may be read, otherwise a
seeded sample). A loss of 0 comes from log Σ exp rounding to the largest logit; its gradient for the true class is 0
as well. It leads the exact rule of `softmax_collapse_frac` because a kernel that sums in sequence absorbs earlier:
for 113 classes in float32 from a lead of 20.70 nats instead of 21.35.

Healthy: 0.

Unhealthy: 0.05 for three steps: collapse has begun; 0.5: most rows have stopped teaching. In the reference run the
share passed 0.3 three hundred steps before the loss exploded.

Source: Prieto et al. (2025), Grokking at the Edge of Numerical Stability, the official code's ``zero_terms``; 0.5 is
the paper's mark, 0.05 and the lead are measured by us.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import per, recorded


def compute(block: Block) -> Mapping[str, Result]:
    """Share of the rows that count."""
    return {"frac": per(block, "zero", "n"), "rows": recorded(block, "n")}


def oracle() -> Iterable[Case]:
    """Counts by hand."""
    yield Case(
        {"n": [[100], [1392], [100], [0], [None], [4]], "zero": [[5], [696], [0], [0], [None], [nan]]},
        {"frac": [[0.05], [0.5], [0], [None], [None], [nan]], "rows": [[100], [1392], [100], [0], [None], [4]]},
        "5 of 100, half of 1,392, none of 100; a batch in which every row is ignored has no share",
        modules=("cross_entropy",),
    )


METRIC = Metric(
    id="loss_zero_frac",
    title="Rows with zero loss",
    site="loss",
    columns=(
        Column("frac", "fraction", "rows whose loss is exactly 0"),
        Column("rows", "count", "rows counted"),
    ),
    compute=compute,
    source="arXiv 2501.04697, official code",
    cost="one read of the log-probabilities that autograd saved",
    plot=Plot("frac"),
    oracle=oracle,
    reads="loss_rows",
    doc=__doc__ or "",
)
