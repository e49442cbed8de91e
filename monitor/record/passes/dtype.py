"""The dtypes in which sums are taken."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def sum_dtype(t: Tensor) -> torch.dtype:
    """float32, which torch allows for everything but float64: it does not narrow."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


@cache
def widest(device: torch.device) -> torch.dtype:
    """float64 where ``device`` has it, else float32: Apple's has not."""
    try:
        torch.ones(1, dtype=torch.float64, device=device).add_(1)
    except (TypeError, RuntimeError):
        return torch.float32
    return torch.float64
