"""How much of Adam's update its epsilon takes away.

    grad_rms = sqrt(mean v̂),   ratio = ε / grad_rms

per parameter, v̂ the bias-corrected second moment after the update: grad_rms is the root mean square of the gradients
that Adam remembers. An element whose gradients are all of size g is updated by g / (g + ε) of the learning rate: 0.91
at a ratio of 0.1, half at 1. Absent where every gradient has been 0. Only for optimizers with ``betas``, ``eps`` and a
second moment.

Healthy: below 1e-2; with the usual ε = 1e-8, gradients are ten thousand times larger in small models.

Unhealthy: above 0.1 while there is still something to learn: updates of this parameter are throttled, and its learning
rate no longer means what it says. Gradients shrink with the size of the model and with the growth of what goes into
its last normalisation. At the end of a memorised training gradients vanish, and a large ratio is no fault.

Source: Wortsman et al. (2023), Small-scale proxies for large-scale Transformer training instabilities, arXiv
2309.14322, sec. 3.4.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import per, recorded


def compute(block: Block) -> Mapping[str, Result]:
    """Epsilon over the root of the mean second moment."""
    return {"ratio": per(block, "eps", "rms"), "grad_rms": recorded(block, "rms")}


def oracle() -> Iterable[Case]:
    """Gradients of ε, 9 ε and ε / 9; no gradient ever; NaN; not recorded."""
    yield Case(
        {
            "rms": [[1e-8], [9e-8], [1e-8 / 9], [0], [nan], [None]],
            "eps": [[1e-8], [1e-8], [1e-8], [1e-8], [1e-8], [None]],
        },
        {
            "ratio": [[1], [1 / 9], [9], [None], [nan], [None]],
            "grad_rms": [[1e-8], [9e-8], [1e-8 / 9], [0], [nan], [None]],
        },
        "the update g / (g + ε) = 1 / (1 + ratio) is then 0.5, 0.9 and 0.1",
        modules=("weight",),
    )


METRIC = Metric(
    id="eps_ratio",
    title="Adam's epsilon",
    site="update",
    columns=(
        Column("ratio", "1", "epsilon over the root mean square of the remembered gradients"),
        Column("grad_rms", "1", "root of the mean bias-corrected second moment"),
    ),
    compute=compute,
    source="arXiv 2309.14322 sec. 3.4",
    cost="one read of the second moments, at every hundredth step and the tenth",
    plot=Plot("ratio", log=True, kind="heatmap"),
    oracle=oracle,
    reads="adam_state",
    doc=__doc__ or "",
)
