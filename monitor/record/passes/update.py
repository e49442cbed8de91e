"""The true change of every parameter in one step, and its norm, with one extra copy of the parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

STATS = ("update_norm", "param_norm")


def update_stats(before: Sequence[Tensor], now: Sequence[Tensor]) -> Tensor:
    """Norm of the change and norm of the tensor, for each; ``before`` becomes a copy of ``now``.

    Args:
        before: the parameters as they were; overwritten.
        now: the parameters; read only.

    Returns:
        ``(tensor, 2)`` float32: norm of ``now - before``, norm of ``now``.

    Cost: per element three reads and two writes, the second half from cache if the caller passes groups that fit one;
    no allocation of tensor size, no host sync.
    Source: definition.
    """
    old, new = list(before), list(now)
    torch._foreach_sub_(old, new)
    change = torch._foreach_norm(old, 2, dtype=torch.float32)
    norm = torch._foreach_norm(new, 2, dtype=torch.float32)
    torch._foreach_copy_(old, new)
    return torch.stack((torch.stack(change), torch.stack(norm)), dim=1)
