"""Wall-clock time of a step, and the part of it that recording took on the training thread.

    seconds = time from the end of the previous update to the end of this one
    monitor_seconds = of these, spent recording

On an accelerator the time is the host's: kernels queued in one step may be waited for in another.

Healthy: constant within tens of per cent; monitor_seconds a few per cent of seconds. Evaluation and checkpoints show
as single long steps.

Unhealthy: slowly growing (a list that is never emptied, a graph that is kept); every k-th step long (a loader that
cannot keep up); monitor_seconds above 10 % of seconds.

Source: definition.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import recorded


def compute(block: Block) -> Mapping[str, Result]:
    """Both times as they were recorded."""
    return {"seconds": recorded(block, "step_seconds"), "monitor_seconds": recorded(block, "monitor_seconds")}


def oracle() -> Iterable[Case]:
    """The first step has no previous update to count from."""
    yield Case(
        {"step_seconds": [[None], [0.25]], "monitor_seconds": [[0.002], [0.004]]},
        {"seconds": [[None], [0.25]], "monitor_seconds": [[0.002], [0.004]]},
        "recorded values pass unchanged",
    )


METRIC = Metric(
    id="step_time",
    title="Step time",
    site="update",
    columns=(
        Column("seconds", "s", "time since the end of the previous update"),
        Column("monitor_seconds", "s", "of these, spent recording on the training thread"),
    ),
    compute=compute,
    source="definition",
    cost="two readings of a clock",
    plot=Plot("seconds", log=True),
    oracle=oracle,
    reads="clock",
    doc=__doc__ or "",
)
