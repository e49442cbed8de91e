"""Cosine between the gradients of two sources of data, at the present weights.

    cosine = g_a' g_b / (‖g_a‖ ‖g_b‖),   g_d the gradient of the mean loss on a fixed batch of source d

One series for each pair of sources, named ``a|b``; the model is in evaluation mode. Measured by the probe
`monitor.probes.Sources`.

Healthy: above 0 while there is something in common to learn; near 0 when all sources are fitted.

Unhealthy: below 0 for long: a step that helps one source harms the other. Expected where sources have classes of their
own and share an output layer.

Source: Hemati et al. (2023), Understanding Hessian alignment for domain generalization, arXiv 2308.11778, the term of
gradients.
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
    """g_a = (3, 4) and g_b = (0, −2): cosine −8 / 10."""
    stats = {
        "cosine": [[-0.8], [nan], [None]],
        "norm": [[5], [0], [None]],
        "other_norm": [[2], [2], [None]],
    }
    yield Case(stats, stats, "recorded values pass unchanged; a gradient of zero points nowhere")


METRIC = Metric(
    id="gradient_alignment",
    title="Alignment of gradients between sources",
    site="gradient",
    columns=(
        Column("cosine", "1", "cosine between the gradients of both sources"),
        Column("norm", "loss/weight", "norm of the first source's gradient"),
        Column("other_norm", "loss/weight", "norm of the second source's gradient"),
    ),
    compute=compute,
    source="arXiv 2308.11778",
    cost="on request: one gradient for each source, as often as asked or 1 % of the run's time allows",
    plot=Plot("cosine"),
    oracle=oracle,
    reads="gradient_alignment",
    doc=__doc__ or "",
)
