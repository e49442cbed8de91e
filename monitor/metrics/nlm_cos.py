"""How much of the gradient only scales the weights up: naive loss minimisation.

    cos = −⟨g, W⟩ / (‖g‖ ‖W‖) per parameter,   total = −Σ_l ⟨g_l, W_l⟩ / (sqrt(Σ_l ‖g_l‖²) · sqrt(Σ_l ‖W_l‖²))

with g the gradient the optimizer used (clipped, unscaled) and W the parameter before the update. A network without
biases can lower its loss, once every sample is classified, by growing alone: the direction of W. In such a network with
ReLU every layer has the same −⟨g, W⟩, the number that `nlm_rate` reads off the logits.

Healthy: near 0 while the network learns to tell samples apart.

Unhealthy: above 0.8 in the last layer, at a training accuracy of 1 and with a z-score of the target that stands still
(`naive_loss_minimisation`): steps scale the logits up instead of learning, on the way to softmax collapse (see
`softmax_collapse_frac`). Once that has begun it falls to about 0, since what is left of the gradient comes from the few
samples that are not absorbed: a fall is no recovery. Alone it says nothing: with a weight decay of 1 it is above 0.9
all through a modular addition that generalises. `monitor.remedies.OrthogonalGradient` changes the gradient itself, so
that it is 0 up to rounding; an optimizer that does so inside its step leaves it as it was and may train well.

Source: Prieto et al. (2025), Grokking at the Edge of Numerical Stability, section 4.2 and figure 5.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf, nan

import numpy as np

from monitor.metric import Block, Case, Column, Metric, Plot, Result


def compute(block: Block) -> Mapping[str, Result]:
    """Cosine of each parameter, and of all as one vector."""
    dot, g, w = block["dot"], block["grad_norm"], block["param_norm"]
    has = block.has("dot") & block.has("grad_norm") & block.has("param_norm")
    size = g * w
    whole = [np.where(has, x, 0.0).sum(axis=1) for x in (dot, np.square(g), np.square(w))]
    sizes = np.sqrt(whole[1]) * np.sqrt(whole[2])
    return {
        "cos": (-dot / size, has & (size != 0)),
        "total": (-whole[0] / sizes, has.any(axis=1) & (sizes != 0)),
    }


def oracle() -> Iterable[Case]:
    """W = (3, 4) with the gradients (−3, −4), (4, −3) and (5, 0); a second parameter at a right angle; nothing; NaN."""
    yield Case(
        {
            "dot": [[-25, 0], [0, 0], [15, None], [0, 0], [None, None], [nan, 1], [1, inf]],
            "grad_norm": [[5, 5], [5, 0], [5, None], [0, 0], [None, None], [1, 1], [1, inf]],
            "param_norm": [[5, 5], [5, 0], [5, None], [5, 5], [None, None], [1, 1], [1, 1]],
        },
        {
            "cos": [[1, 0], [0, None], [-0.6, None], [None, None], [None, None], [nan, -1], [-1, nan]],
            "total": [0.5, 0, -0.6, None, None, nan, nan],
        },
        "parallel 1, orthogonal 0, 15/25; of no gradient or a parameter of zeros there is no angle",
        modules=("a", "b"),
    )


METRIC = Metric(
    id="nlm_cos",
    title="Gradient along the weights",
    site="gradient",
    columns=(
        Column("cos", "1", "cosine between the negative gradient and the parameter"),
        Column("total", "1", "the same over all parameters as one vector"),
    ),
    compute=compute,
    source="arXiv 2501.04697, section 4.2",
    cost="beyond update_ratio, every 10 steps one read of the gradients",
    plot=Plot("cos", kind="heatmap"),
    oracle=oracle,
    reads="alignment",
    doc=__doc__ or "",
)
