"""The true change of every parameter in one step, and its norm, with one extra copy of the parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from monitor.record.passes.side_by_side import norms

STATS = ("update_norm", "param_norm")


def update_stats(before: Sequence[Tensor], now: Sequence[Tensor]) -> Tensor:
    """The statistics `STATS` of each parameter on an accelerator; `parameter.ParameterReader` has those on a CPU.

    Args:
        before: the parameters as they were; overwritten by the negative change.
        now: the parameters, of one dtype; read only.

    Returns:
        ``(parameter, 2)`` float64 where the device has it, else float32: norm of ``now - before``, norm of ``now``.

    Cost: per element four reads and a write; no allocation of tensor size, no host sync.
    Source: definition.
    """
    olds, news = list(before), list(now)
    torch._foreach_sub_(olds, news)
    return torch.stack((norms(olds, 2), norms(news, 2)), dim=1)
