"""What went into the model: size, extremes, non-finite values and a fingerprint that recognises a repeated batch."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

from monitor.record.passes.dtype import sum_dtype

STATS = ("n", "sumsq", "max_abs", "nonfinite", "fingerprint")
MERGE = ("sum", "sum", "max", "sum", "last")

#: Fingerprints are below 2^24, so that a float32 row holds them exactly.
_MODULUS = 1 << 24
_SAMPLE = 1024
_PRIME = 1000003


def input_stats(x: Tensor) -> Tensor | list[float]:
    """The statistics `STATS` of one input tensor.

    Args:
        x: any shape; floating, integer or bool. Read only.

    Returns:
        ``(5,)`` numbers on a CPU, a float32 tensor elsewhere: elements, sum of squares, largest absolute value (NaN if
        any element is), elements that are NaN or infinite, fingerprint of 1,024 evenly spaced elements. For integers
        and bools ``(1,)``: the fingerprint.

    Cost: two reads of ``x`` (three when something in it is not finite); no host sync on an accelerator.
    Source: definition.
    """
    mark = _fingerprint(x)
    if not x.is_floating_point():
        return mark.view(1) if isinstance(mark, Tensor) else [mark]
    low, high = torch.aminmax(x)
    norm = torch.linalg.vector_norm(x, dtype=sum_dtype(x))
    if isinstance(mark, Tensor):
        bad = (~torch.isfinite(x)).sum().float()
        size = torch.full_like(mark, float(x.numel()))
        return torch.stack((size, norm.square().float(), torch.maximum(-low, high).float(), bad, mark))
    size, a, b = float(norm), float(low), float(high)
    # counting costs ten times the norm on a CPU, and a finite norm proves that there is nothing to count
    count = 0.0 if math.isfinite(size) else float((~torch.isfinite(x)).sum())
    return [float(x.numel()), size * size, a if math.isnan(a) else max(-a, b), count, mark]


def _fingerprint(x: Tensor) -> Tensor | float:
    flat = x.reshape(-1) if x.is_contiguous() else x.flatten()
    stride = max(1, flat.numel() // _SAMPLE)
    some = flat[::stride][:_SAMPLE].contiguous()
    whole = some.view(torch.int32 if some.element_size() == 4 else torch.uint8)
    if x.device.type == "cpu":
        array = whole.numpy().astype(np.int64) % _PRIME
        return float((array * _weights(array.size)).sum() % _MODULUS)
    weights = torch.from_numpy(_weights(whole.numel())).to(x.device, non_blocking=True)
    return ((whole.to(torch.int64) % _PRIME) * weights).sum().remainder(_MODULUS).float()


@cache
def _weights(n: int) -> np.ndarray:
    """Fixed odd-looking factors, so that swapped elements change the sum."""
    return np.arange(1, n + 1, dtype=np.int64) * 2654435761 % _PRIME
