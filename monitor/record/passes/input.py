"""What went into the model: size, extremes, non-finite values and a fingerprint that recognises a repeated batch."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

from monitor.record.passes.arrays import Array, dot
from monitor.record.passes.dtype import sum_dtype

STATS = ("n", "sumsq", "max_abs", "nonfinite", "fingerprint")
MERGE = ("sum", "sum", "max", "sum", "last")

_SAMPLE = 1024
#: What numpy reads as it is.
_READABLE = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float32, torch.float64}
#: Bits as which an element can be read, by its bytes.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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
    if x.device.type == "cpu" and x.dtype in _READABLE:
        return _of_array(x.numpy(force=True))
    mark = _fingerprint(x)
    if not x.is_floating_point():
        return mark.view(1) if isinstance(mark, Tensor) else [mark]
    norm = torch.linalg.vector_norm(x, dtype=sum_dtype(x))
    low, high = torch.aminmax(x)
    if isinstance(mark, Tensor):
        bad = (~torch.isfinite(x)).sum().float()
        size = torch.full_like(mark, float(x.numel()))
        return torch.stack((size, norm.square().float(), torch.maximum(-low, high).float(), bad, mark))
    size, a, b = float(norm), float(low), float(high)
    # counting costs ten times the norm on a CPU, and a finite norm proves that there is nothing to count
    count = 0.0 if math.isfinite(size) else float((~torch.isfinite(x)).sum())
    return [float(x.numel()), size * size, a if math.isnan(a) else max(-a, b), count, mark]


def _of_array(x: Array) -> list[float]:
    """`input_stats` where numpy can read: on a CPU its calls cost a fifth of torch's."""
    if x.dtype.kind != "f":
        return [_hash(_sampled(x))]
    with np.errstate(all="ignore"):
        flat = x.ravel(order="K")  # in memory order, in which no copy is needed
        size, low, high = dot(flat, flat), float(np.minimum.reduce(flat)), float(np.maximum.reduce(flat))
    # a finite sum proves that there is nothing to count
    count = 0.0 if math.isfinite(size) else float(x.size - np.isfinite(flat).sum())
    return [float(x.size), size, low if math.isnan(low) else max(-low, high), count, _hash(_sampled(x))]


def _sampled(x: Array) -> Array:
    """``(1024,)`` evenly spaced elements, or all of fewer."""
    stride = max(1, x.size // _SAMPLE)
    return x.reshape(-1)[::stride][:_SAMPLE] if x.flags.c_contiguous else x.flat[: _SAMPLE * stride : stride]


def _hash(some: Array) -> float:
    """Multiply-shift hash (Dietzfelbinger et al., 1997) of the bits: below 2^24, so that a float32 holds it exactly."""
    if some.itemsize < 4:
        words = some.view(f"i{some.itemsize}" if some.itemsize > 1 else "u1").astype(np.uint32)
    else:
        words = np.ascontiguousarray(some).view(np.uint32)
    return float(np.dot(words, _weights(words.size)) >> 8)


def _fingerprint(x: Tensor) -> Tensor | float:
    """`_hash` of a tensor that numpy cannot read."""
    bits = x.detach().resolve_neg().view(_BITS[x.element_size()])
    some = bits.reshape(-1)[:: max(1, bits.numel() // _SAMPLE)][:_SAMPLE]
    if x.device.type == "cpu":
        return _hash(some.numpy())
    words = some.to(torch.int64) if some.element_size() < 8 else some.contiguous().view(torch.int32).to(torch.int64)
    weights = torch.from_numpy(_weights(words.numel()).astype(np.int64)).to(x.device, non_blocking=True)
    return (((words * weights).sum() & 0xFFFFFFFF) >> 8).float()


@cache
def _weights(n: int) -> np.ndarray:
    """Fixed odd factors of 32 bits that have nothing to do with each other, so that swapped elements change the sum."""
    return np.random.default_rng(0).integers(0, 1 << 31, n, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
