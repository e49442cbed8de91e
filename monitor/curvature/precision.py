"""Sums in float64, also of what lies on a device that has none, as Apple's: then they are taken on the host.

A model computes in its own dtype, on its own device. What follows from its gradients and products cancels, and is worth
more digits than they have.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

#: Elements that are on the host at once.
_PIECE = 1 << 22


@cache
def widest(device: torch.device) -> torch.dtype:
    """float64 where ``device`` has it, else float32: Apple's has not."""
    try:
        torch.ones(1, dtype=torch.float64, device=device).add_(1)
    except (TypeError, RuntimeError):
        return torch.float32
    return torch.float64


def double(t: Tensor) -> Tensor:
    """``t`` in float64: where it is if its device has that, else on the host."""
    return t.double() if widest(t.device) == torch.float64 else t.cpu().double()


def dot(a: Tensor, b: Tensor) -> float:
    """The inner product of two vectors ``(n,)`` of one device, in float64. Waits for the device."""
    if widest(a.device) == torch.float64:
        return float(a.double() @ b.double())
    pieces = zip(a.split(_PIECE), b.split(_PIECE), strict=True)
    return sum(float(double(x) @ double(y)) for x, y in pieces)
