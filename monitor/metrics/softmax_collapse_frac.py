"""Share of rows whose softmax has lost its rivals to rounding: softmax collapse, by the exact rule.

    frac = (1/N) #{i : R_i ≤ u and argmax z_i = y_i},   any_frac: without the condition on the label
    R_i = Σ_{k ≠ argmax} exp(z_ik − max z_i),   u = 2^-p the unit roundoff of the dtype the loss is computed in

over the N rows read. R ≤ u means 1 + R rounds to 1: the loss of the row and its gradient for the true class are
exactly 0, while gradients of the wrong classes survive. The rule does not depend on the order of summation, so it is
later than two others: the paper's counter (Σ exp == 1 as summed) and what the user's kernel did, `loss_zero_frac`, on
which alarms are placed. For K equal wrong logits at distance d it fires from d = ln(K−1) + p ln 2: 21.35 nats for 113
classes in float32.

Healthy: 0.

Unhealthy: 0.05 and rising: these rows no longer teach their label. At 0.5 learning has stopped or is rounding noise,
and with a tiny Adam ε the next non-zero gradient can explode.

Source: Prieto et al. (2025), Grokking at the Edge of Numerical Stability, Definitions 1 to 3, with u = eps/2 as IEEE
rounding to even has it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import per, recorded


def compute(block: Block) -> Mapping[str, Result]:
    """Shares of the rows that were read."""
    return {
        "frac": per(block, "collapsed", "n"),
        "any_frac": per(block, "collapsed_any", "n"),
        "rows": recorded(block, "n"),
    }


def oracle() -> Iterable[Case]:
    """Logits (d, 0) with d = 16.60, 16.65, 17, 18 in float32, where the rule fires from 24 ln 2 = 16.6355."""
    yield Case(
        {"n": [[4], [4], [0], [4]], "collapsed": [[2], [None], [0], [nan]], "collapsed_any": [[3], [3], [0], [nan]]},
        {
            "frac": [[0.5], [None], [None], [nan]],
            "any_frac": [[0.75], [0.75], [None], [nan]],
            "rows": [[4], [4], [0], [4]],
        },
        "three of four collapse, one of them on the wrong label; without labels only any_frac; no rows: absent",
        modules=("cross_entropy",),
    )


METRIC = Metric(
    id="softmax_collapse_frac",
    title="Softmax collapse",
    site="logits",
    columns=(
        Column("frac", "fraction", "rows absorbed by rounding on their true class"),
        Column("any_frac", "fraction", "rows absorbed by rounding on any class"),
        Column("rows", "count", "rows read"),
    ),
    compute=compute,
    source="arXiv 2501.04697 Def. 1-3",
    cost="shared by all metrics of logits: up to 256 rows, or all of 2^14 logits; every 5 steps, 20 on an accelerator",
    plot=Plot("frac"),
    oracle=oracle,
    reads="logit_rows",
    doc=__doc__ or "",
)
