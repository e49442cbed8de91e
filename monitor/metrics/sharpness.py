"""Sharpness: the largest eigenvalue of the Hessian of the training loss on the batch of one step.

    value = λ_max(H),   H = ∂²L/∂θ∂θ,   residual = ‖H v − value · v‖

over the parameters that the optimizer trains (``parameters`` of them), at the parameters of the step and with its batch
(``examples`` rows), dropout masks and batch statistics. ``value`` is a Rayleigh quotient, so never above the true
eigenvalue, and some eigenvalue lies within ``residual`` of it; ``converged`` is 1 where residual and change are within
0.1 %. Measured by Lanczos iteration in float32, autocast off, after checking that the gradient of the loss that was
played again is the run's. Where several processes train with DistributedDataParallel, loss, gradient and batch are
those of the first one's micro-batches, which the others wait for: a smaller batch than that of the step.

Of a loss that was given to be measured instead, ``of_step`` says whether its gradient is the run's: where it is 0 the
loss is another one, as of held-out data, and nothing that trains is judged by it.

A small batch is sharper than the whole data set: on a small network 3.5 times at 16 examples, 1.7 times at 64, 1.1
times at 1,024. Compare values of one run only, and with a step size only where the batch is all the data.

Healthy: rises for the first part of a run, then settles where `edge_of_stability` says; with a small batch, below it.

Unhealthy: growing by factors of ten without end; NaN. High values alone are no fault: they depend on the scale of the
weights.

Source: Cohen et al. (2021), Gradient descent on neural networks typically occurs at the edge of stability,
arXiv 2103.00065.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf, nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import recorded


def compute(block: Block) -> Mapping[str, Result]:
    """All columns as they were recorded."""
    return {c.name: recorded(block, c.name) for c in METRIC.columns}


def oracle() -> Iterable[Case]:
    """The Hessian of (ab − 1)²/2 at (2, ½) is [[¼, 1], [1, 4]]: eigenvalues 0 and 4¼."""
    stats = {
        "value": [[4.25], [nan], [None]],
        "residual": [[2e-6], [inf], [None]],
        "converged": [[1], [0], [None]],
        "products": [[2], [100], [None]],
        "examples": [[1], [None], [None]],
        "parameters": [[2], [2], [None]],
        "loss": [[0], [nan], [None]],
        "of_step": [[1], [0], [None]],
    }
    yield Case(stats, stats, "recorded values pass unchanged; a closure does not say how many examples it has")


METRIC = Metric(
    id="sharpness",
    title="Sharpness (largest Hessian eigenvalue)",
    site="loss",
    columns=(
        Column("value", "loss/weight²", "largest eigenvalue of the Hessian of the batch's loss"),
        Column("residual", "loss/weight²", "an eigenvalue lies within this of the value"),
        Column("converged", "1", "1 if residual and change are within tolerance, else 0"),
        Column("products", "count", "products with the Hessian that it took"),
        Column("examples", "count", "rows of the batch; of several processes, of the first one's"),
        Column("parameters", "count", "size of the Hessian"),
        Column("loss", "loss", "loss of the batch, as it was measured"),
        Column("of_step", "1", "1 if the loss is that of the step, 0 if another was given to be measured"),
    ),
    compute=compute,
    source="arXiv 2103.00065",
    cost="8 to 25 Hessian products, each about two gradients, at a cadence inside a stated share of the run's time",
    plot=Plot("value", log=True),
    oracle=oracle,
    reads="sharpness",
    doc=__doc__ or "",
)
