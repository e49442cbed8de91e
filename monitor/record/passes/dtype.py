"""The dtype in which sums are taken."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_dtype(t: Tensor) -> torch.dtype:
    """float32, which torch allows for everything but float64: it does not narrow."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32
