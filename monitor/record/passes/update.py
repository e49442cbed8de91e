"""The true change of every parameter in one step, and its norm, with one extra copy of the parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

STATS = ("update_norm", "param_norm")


def update_stats(before: Sequence[Tensor], now: Sequence[Tensor]) -> list[Tensor]:
    """Norm of the change and norm of the tensor, for each; ``before`` becomes a copy of ``now``.

    Args:
        before: the parameters as they were; overwritten.
        now: the parameters; read only.

    Returns:
        0-d float32 tensors, two for each parameter in turn: norm of ``now - before``, norm of ``now``.

    Cost: per element three reads and two writes, the second half from cache if the caller passes groups that fit one;
    no allocation of tensor size, no host sync.
    Source: definition.
    """
    if len(now) == 1:
        old, new = before[0], now[0]
        change = torch.linalg.vector_norm(old.sub_(new), dtype=torch.float32)
        norm = torch.linalg.vector_norm(new, dtype=torch.float32)
        old.copy_(new)
        return [change, norm]
    olds, news = list(before), list(now)
    torch._foreach_sub_(olds, news)
    changes = torch._foreach_norm(olds, 2, dtype=torch.float32)
    norms = torch._foreach_norm(news, 2, dtype=torch.float32)
    torch._foreach_copy_(olds, news)
    return [value for pair in zip(changes, norms, strict=True) for value in pair]
