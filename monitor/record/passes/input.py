"""What went into the model: size, extremes, non-finite values and a fingerprint that recognises a repeated batch."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

STATS = ("n", "sumsq", "max_abs", "nonfinite", "fingerprint")
MERGE = ("sum", "sum", "max", "sum", "last")

#: Fingerprints are below 2^24, so that a float32 row holds them exactly.
_MODULUS = 1 << 24
_SAMPLE = 1024
_PRIME = 1000003


def input_stats(x: Tensor) -> Tensor:
    """The statistics `STATS` of one input tensor.

    Args:
        x: any shape; floating, integer or bool. Read only.

    Returns:
        ``(5,)`` float32: elements, sum of squares, largest absolute value (NaN if any element is), elements that are
        NaN or infinite, fingerprint of 1,024 evenly spaced elements. For integers and bools ``(1,)``: the fingerprint.

    Cost: two reads of ``x`` (three when something in it is not finite); no host sync on an accelerator.
    Source: definition.
    """
    mark = _fingerprint(x)
    if not x.is_floating_point():
        return mark.view(1)
    low, high = torch.aminmax(x)
    peak = torch.maximum(-low, high).float()
    norm = torch.linalg.vector_norm(x, dtype=torch.float32)
    if x.device.type == "cpu" and math.isfinite(float(norm)):
        bad = torch.zeros(())  # counting costs ten times the norm on a CPU, and a finite norm proves there is nothing
    else:
        bad = (~torch.isfinite(x)).sum().float()
    return torch.stack((torch.full_like(mark, float(x.numel())), norm.square(), peak, bad, mark))


def _fingerprint(x: Tensor) -> Tensor:
    flat = x.detach().reshape(-1) if x.is_contiguous() else x.detach().flatten()
    stride = max(1, flat.numel() // _SAMPLE)
    some = flat[::stride][:_SAMPLE].contiguous()
    if some.numel() == 0:
        return torch.zeros((), device=x.device)
    whole = (
        some.view(torch.uint8).to(torch.int64) if some.element_size() != 4 else some.view(torch.int32).to(torch.int64)
    )
    return (whole.remainder_(_PRIME) * _weights(whole.numel(), x.device)).sum().remainder(_MODULUS).float()


@cache
def _weights(n: int, device: torch.device) -> Tensor:
    """Fixed odd-looking factors, so that swapped elements change the sum."""
    return torch.arange(1, n + 1, device=device) * 2654435761 % _PRIME
