"""How many updates an optimizer's memory of one parameter holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    from monitor.record.recorder import Recorder


def updates(recorder: Recorder, optimizer: Optimizer, state: Mapping[str, Any]) -> float | None:
    """Updates in ``state``, what ``optimizer`` remembers of one parameter; None if it does not count them.

    From the optimizer's own counter; where reading that would wait for a device, those since it was first seen.
    """
    step = state.get("step")
    if isinstance(step, Tensor):
        return float(step.item() if step.is_cpu else recorder.updates(optimizer))
    return float(step) if isinstance(step, int | float) else None
