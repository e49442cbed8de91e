"""Non-finite activations, at the place where they were born.

When a loss is NaN or infinite, the autograd graph that it belongs to is walked in the order of execution, and the first
value that is not finite is recorded under the module whose parameters come before it, with the operation in brackets:
``blocks.1.ff (Log)``. Nothing is recorded while losses are finite, so any value is bad news.

Healthy: never recorded. Unhealthy: any count. Only the first three losses are looked into, because after an update with
NaN gradients everything is NaN. Not available on an accelerator, where looking at the loss would wait for the device.

Source: definition.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from monitor.metric import Block, Case, Column, Metric, Plot, Result


def compute(block: Block) -> Mapping[str, Result]:
    """The count as it was taken."""
    return {"count": (block["count"], block.has("count"))}


def oracle() -> Iterable[Case]:
    """Two NaN elements at the second of two steps."""
    yield Case({"count": [[None], [2.0]]}, {"count": [[None], [2.0]]}, "recorded only when it happened")


METRIC = Metric(
    id="activation_nonfinite",
    title="Non-finite activations",
    site="activation",
    columns=(Column("count", "count", "elements that are NaN or infinite in the earliest such value of the step"),),
    compute=compute,
    source="definition",
    cost="nothing while losses are finite; one read of the saved activations when one is not",
    plot=Plot("count"),
    oracle=oracle,
    reads="birthplace",
    doc=__doc__ or "",
)
