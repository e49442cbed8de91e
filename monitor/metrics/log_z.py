"""The normaliser of the softmax, log Z = log Σ_k exp(z_k), and the z-loss that would hold it.

    mean = (1/N) Σ_i lse_i,   std = sqrt((1/N) Σ_i lse_i² − mean²),   z_loss = (1/N) Σ_i lse_i²,   excess = mean − ln K

over the N rows read and K classes, natural logarithm. ``excess`` is 0 where all logits are 0. ``z_loss`` is before its
coefficient (1e-4 is usual); not to be confused with the "Z-loss" of the spherical family. ``std`` is the difference of
two float32 sums: below 5e-4 of ``mean`` it reads 0.

Healthy: near ln K at the start (K classes, logits near 0), then within a few nats of it.

Unhealthy: drifting one way for thousands of steps, below −5 or above ln K + 20. Very negative values, late in a long
run without weight decay or z-loss, are the documented output-logit divergence.

Source: Wortsman et al. (2023), Small-scale proxies for large-scale Transformer training instabilities, sec. 3.1.2;
the limits are ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf, nan

import numpy as np

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import per

#: Both sums are float32: each is off by up to 2^-24 of itself, their difference by three times that.
RESOLUTION = 2.0**-22


def compute(block: Block) -> Mapping[str, Result]:
    """Moments of log Z over the rows that were read."""
    mean, mean_has = per(block, "sum_lse", "n")
    z_loss, square_has = per(block, "sumsq_lse", "n")
    variance = z_loss - mean**2
    std = np.sqrt(np.where(variance < RESOLUTION * z_loss, 0.0, variance))
    return {
        "mean": (mean, mean_has),
        "std": (std, mean_has & square_has),
        "z_loss": (z_loss, square_has),
        "excess": (mean - np.log(block["classes"]), mean_has & block.has("classes")),
    }


def oracle() -> Iterable[Case]:
    """Zero logits over 50,257 classes; lse = 1..10; no rows; NaN; inf."""
    yield Case(
        {
            "n": [[1], [10], [0], [1], [2]],
            "classes": [[2], [4], [4], [4], [4]],
            "sum_lse": [[10.824905], [55], [0], [nan], [inf]],
            "sumsq_lse": [[117.17857], [385], [0], [nan], [inf]],
        },
        {
            "mean": [[10.824905], [5.5], [None], [nan], [inf]],
            "std": [[0.0], [2.8722813], [None], [nan], [nan]],
            "z_loss": [[117.17857], [38.5], [None], [nan], [inf]],
            "excess": [[10.1317578], [4.1137056], [None], [nan], [inf]],
        },
        "ln 50257 = 10.824905 and its square; 1..10 has variance 8.25 and K = 4 takes ln 4; inf has no spread",
        modules=("cross_entropy",),
    )


METRIC = Metric(
    id="log_z",
    title="Softmax normaliser",
    site="logits",
    columns=(
        Column("mean", "nats", "mean of log Σ exp(z)"),
        Column("std", "nats", "its standard deviation over rows"),
        Column("z_loss", "loss", "mean of its square, before any coefficient"),
        Column("excess", "nats", "mean above that of zero logits, ln K"),
    ),
    compute=compute,
    source="arXiv 2309.14322 sec. 3.1.2",
    cost="shared by all metrics of logits: up to 256 rows, or all of 2^14 logits; every 5 steps, 20 on an accelerator",
    plot=Plot("mean"),
    oracle=oracle,
    reads="logit_rows",
    doc=__doc__ or "",
)
