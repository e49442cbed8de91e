"""The true change of every parameter in one step, and its norm, with one extra copy of the parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from monitor.record.passes.dtype import sum_dtype

STATS = ("update_norm", "param_norm")


def update_stats(before: Sequence[Tensor], now: Sequence[Tensor]) -> Tensor:
    """The statistics `STATS` of each parameter on an accelerator; `parameter.ParameterReader` has those on a CPU.

    Args:
        before: the parameters as they were; overwritten by the negative change.
        now: the parameters, of one dtype; read only.

    Returns:
        ``(parameter, 2)`` float32 or float64: norm of ``now - before``, norm of ``now``.

    Cost: per element four reads and a write; no allocation of tensor size, no host sync.
    Source: definition.
    """
    dtype = sum_dtype(now[0])
    olds, news = list(before), list(now)
    torch._foreach_sub_(olds, news)
    changes = torch._foreach_norm(olds, 2, dtype=dtype)
    norms = torch._foreach_norm(news, 2, dtype=dtype)
    return torch.stack((torch.stack(changes), torch.stack(norms)), dim=1)
