"""How far the model's predictions on fixed examples have moved since an earlier look.

    kl = mean over rows of KL( softmax(z_past / τ) ‖ softmax(z_now / τ) ),   z the scores of a row, τ = ``temperature``

``changed`` is the share of rows whose most probable class is another than at the earlier look, ``steps`` the updates
between both. The divergence of small moves grows with the square of the move, and a high temperature makes it smaller:
compare at equal ``steps`` and ``temperature`` only. The model is in evaluation mode. Measured by the probe
`monitor.probes.TrajectoryKL`.

Healthy: falls by orders of magnitude as the training settles: on digits from 0.2 in the first hundred steps to 2e-4
after 2,000 (measured, as what follows).

Unhealthy: level at a constant learning rate. The function wanders, because the rate is too high (0.2 to 0.4 at ten
times that rate, up to the divergence) or because labels contradict each other (0.008 with a fifth of them wrong).

Source: Du et al. (2022), Sharpness-aware training for free, arXiv 2205.14083 (τ = 5, three epochs apart).
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
    """(½, ¼, ¼) against (¼, ¼, ½): ln 2 / 4 nats; scores that are not finite; nothing to compare with yet."""
    stats = {
        "kl": [[0.1732868], [nan], [None]],
        "changed": [[1], [nan], [None]],
        "steps": [[100], [100], [None]],
        "temperature": [[1], [1], [None]],
        "rows": [[1], [1], [None]],
    }
    yield Case(stats, stats, "recorded values pass unchanged; ½ ln 2 + ¼ ln ½ = ¼ ln 2")


METRIC = Metric(
    id="trajectory_kl",
    title="Movement of the predictions",
    site="logits",
    columns=(
        Column("kl", "nats", "mean divergence of the earlier predictions from the present ones"),
        Column("changed", "fraction", "rows whose most probable class is another"),
        Column("steps", "steps", "updates between both looks"),
        Column("temperature", "1", "what scores are divided by"),
        Column("rows", "count", "rows compared"),
    ),
    compute=compute,
    source="arXiv 2205.14083",
    cost="on request: one forward of the run's first batch (0.4 steps of a small GPT, measured), as often as asked or "
    "0.5 % of the run's time allows; the scores of 256 rows for each look that is remembered",
    plot=Plot("kl", log=True),
    oracle=oracle,
    reads="trajectory_kl",
    doc=__doc__ or "",
)
