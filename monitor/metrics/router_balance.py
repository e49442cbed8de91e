"""How evenly a router uses its experts, how sure it is of each choice, and how large its scores are.

    f_e = n_e / Σ n:  cv = std(f) / mean(f),  max_violation = E · max f − 1,  effective = exp(H(f))
    P_t = softmax(z_t):  entropy = mean_t H(P_t),  normalised = entropy / ln E,  mean_normalised = H(mean_t P_t) / ln E
    z = mean_t (ln Σ_e exp z_te)²,  max_logit = max z_te,  margin = mean_t (z_t(1) − z_t(2))
    mutual_information = H(mean_t P_t) − mean_t H(P_t)
    over_capacity = Σ_e max(0, n_e − ⌈1.25 · k T / E⌉) / (k T)

for E experts with n_e assignments each, over every token of a step that this process saw (``tokens``); P and z over at
most 2^15 / E evenly spaced ones (``rows``), so that ``max_logit`` is the largest among these. Absent where the scores
before the softmax cannot be read (under activation checkpointing: z and max_logit). With k experts a token, cv is at
most √(E/k − 1), and effective lies between k and E.

Healthy: cv below 1 and effective near E. A specialised router has a low ``normalised`` (sure of each token) and a high
``mean_normalised`` (together they use all experts), which is a large mutual_information; a fresh one has both near 1.

Unhealthy: both low: every token is sent to the same experts; cv near its largest value and effective near k: the router
has collapsed. z or max_logit growing without end: scores leave the range in which a softmax learns.

Source: Shazeer et al. (2017), arXiv 1701.06538, eq. 7, for cv; Wang et al. (2024), Auxiliary-Loss-Free Load Balancing,
arXiv 2408.15664, for the violation; Zoph et al. (2022), ST-MoE, arXiv 2202.08906, eq. 5, for z; Fedus et al. (2021),
Switch Transformers, arXiv 2101.03961, section 2.2, for the capacity.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf, nan

import numpy as np

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import among, per, recorded


def compute(block: Block) -> Mapping[str, Result]:
    """Balance of the loads, entropies of the probabilities, size of the scores."""
    experts, knows_experts = recorded(block, "experts")
    some = knows_experts & (experts != 1)
    squares, knows_loads = among(block, "sumsq_load", "tokens")
    largest, knows_largest = among(block, "max_load", "tokens")
    spread, knows_spread = among(block, "load_entropy", "tokens")
    entropy, knows_entropy = per(block, "sum_entropy", "rows")
    mean, knows_mean = among(block, "mean_entropy", "rows")
    ln = np.log(experts)
    return {
        # E · Σ f² is at least 1; rounding must not make it less
        "cv": (np.sqrt(np.maximum(experts * squares - 1, 0)), knows_loads & some),
        "max_violation": (experts * largest - 1, knows_largest & some),
        "effective": (np.exp(spread), knows_spread),
        "entropy": (entropy, knows_entropy),
        "normalised": (entropy / ln, knows_entropy & some),
        "mean_normalised": (mean / ln, knows_mean & some),
        "z": per(block, "sumsq_lse", "rows"),
        "max_logit": among(block, "max_z", "rows"),
        "experts": recorded(block, "experts"),
        "top_k": per(block, "assigned", "tokens"),
        "tokens": recorded(block, "tokens"),
        "rows": recorded(block, "rows"),
        "margin": per(block, "sum_margin", "rows"),
        "mutual_information": (mean - entropy, knows_mean & knows_entropy),
        "over_capacity": per(block, "over", "assigned"),
        "dropped": per(block, "dropped", "limited"),
        "early_z": recorded(block, "early_z"),
    }


def oracle() -> Iterable[Case]:
    """Eight experts: two with everything, all alike; nothing seen; scores not finite, and not read."""
    ln8, ln2 = 2.0794415416798357, 0.6931471805599453
    yield Case(
        {
            "tokens": [[64], [64], [0], [8], [8]],
            "rows": [[64], [64], [0], [8], [None]],
            "experts": [[8], [8], [8], [8], [8]],
            "assigned": [[128], [64], [0], [16], [16]],
            "sum_entropy": [[0], [64 * ln8], [0], [nan], [None]],
            "mean_entropy": [[ln2], [ln8], [nan], [nan], [None]],
            "sumsq_lse": [[6400], [276.740933], [0], [inf], [None]],
            "max_z": [[10], [0], [-inf], [inf], [None]],
            "sumsq_load": [[0.5], [0.125], [nan], [0.125], [0.5]],
            "max_load": [[0.5], [0.125], [nan], [0.125], [0.5]],
            "load_entropy": [[ln2], [ln8], [nan], [ln8], [ln2]],
            "sum_margin": [[640], [0], [0], [nan], [None]],
            "over": [[88], [0], [0], [0], [0]],
            "dropped": [[32], [0], [0], [0], [0]],
            "limited": [[128], [64], [0], [0], [0]],
            "early_z": [[None], [4.0], [None], [4.0], [None]],
        },
        {
            "cv": [[1.7320508], [0], [None], [0], [1.7320508]],
            "max_violation": [[3], [0], [None], [0], [3]],
            "effective": [[2], [8], [None], [8], [2]],
            "entropy": [[0], [2.0794415], [None], [nan], [None]],
            "normalised": [[0], [1], [None], [nan], [None]],
            "mean_normalised": [[1 / 3], [1], [None], [nan], [None]],
            "z": [[100], [4.324077], [None], [inf], [None]],
            "max_logit": [[10], [0], [None], [inf], [None]],
            "experts": [[8], [8], [8], [8], [8]],
            "top_k": [[2], [1], [None], [2], [2]],
            "tokens": [[64], [64], [0], [8], [8]],
            "rows": [[64], [64], [0], [8], [None]],
            "margin": [[10], [0], [None], [nan], [None]],
            "mutual_information": [[ln2], [0], [None], [nan], [None]],
            "over_capacity": [[0.6875], [0], [None], [0], [0]],
            "dropped": [[0.25], [0], [None], [None], [None]],
            "early_z": [[None], [4.0], [None], [4.0], [None]],
        },
        "f = (½, ½, 0, …): cv √3, violation 3, 2 effective; zero scores: H = ln 8, z = (ln 8)² = 4.324077",
        modules=("router",),
    )


METRIC = Metric(
    id="router_balance",
    title="Router balance",
    site="router",
    columns=(
        Column("cv", "1", "standard deviation of the experts' loads over their mean"),
        Column("max_violation", "1", "largest load over its share in perfect balance, minus 1"),
        Column("effective", "1", "experts in use: exponential of the entropy of the loads"),
        Column("entropy", "nats", "mean entropy of a token's probabilities"),
        Column("normalised", "fraction", "that entropy over its largest possible value, ln E"),
        Column("mean_normalised", "fraction", "entropy of the mean probabilities, over ln E"),
        Column("z", "1", "mean squared log-sum-exp of the scores (router z-loss, without its weight)"),
        Column("max_logit", "nats", "largest score among the rows read"),
        Column("experts", "count", "experts to choose from"),
        Column("top_k", "1", "experts of a token"),
        Column("tokens", "count", "tokens routed"),
        Column("rows", "count", "tokens whose scores were read"),
        Column("margin", "nats", "mean difference of a token's largest and second largest score"),
        Column("mutual_information", "nats", "entropy of the mean probabilities less the mean entropy of a token"),
        Column("over_capacity", "fraction", "assignments that a capacity factor of 1.25 would drop, were there one"),
        Column("dropped", "fraction", "assignments that the model's own capacity limit dropped"),
        Column("early_z", "1", "z at a twentieth of the steps so far"),
    ),
    compute=compute,
    source="arXiv 1701.06538 eq. 7; arXiv 2408.15664; arXiv 2202.08906 eq. 5; arXiv 2101.03961 sec. 2.2",
    cost="shared by all metrics of routers: the chosen experts of all tokens and at most 2^15 scores, every 5 steps",
    plot=Plot("cv"),
    oracle=oracle,
    reads="router",
    doc=__doc__ or "",
)
