"""What went into the model: size, extremes, non-finite values and a fingerprint that recognises a repeated batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, lru_cache

import numpy as np
import torch
from torch import Tensor

from monitor.record.passes.arrays import Array, dot
from monitor.record.passes.dtype import sum_dtype

STATS = ("n", "sumsq", "max_abs", "nonfinite", "fingerprint")
MERGE = ("sum", "sum", "max", "sum", "last")

_SAMPLE = 1024
#: Elements of the scratch in which non-finite ones are counted on an accelerator.
_SCRATCH = 1 << 24
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
    if x.device.type != "cpu":
        mark = fingerprints([x])[0].view(1)
        if not x.is_floating_point():
            return mark.float()
        return torch.cat((mark.new_full((1,), x.numel(), dtype=torch.float32), sizes(x), mark.float()))
    mark = _fingerprint(x)
    if not x.is_floating_point():
        return [mark]
    norm = torch.linalg.vector_norm(x, dtype=sum_dtype(x))
    low, high = torch.aminmax(x)
    size, a, b = float(norm), float(low), float(high)
    # counting costs ten times the norm on a CPU, and a finite norm proves that there is nothing to count
    count = 0.0 if math.isfinite(size) else float((~torch.isfinite(x)).sum())
    return [float(x.numel()), size * size, a if math.isnan(a) else max(-a, b), count, mark]


def sizes(x: Tensor) -> Tensor:
    """Sum of squares, largest absolute value and number of NaN and infinite elements: ``(3,)`` float32.

    Args:
        x: floating, on an accelerator. Read only.

    Cost: four reads of ``x`` in six operations; scratch of its size or of 64 MiB of float32 at a time; no host sync.
    """
    dtype = sum_dtype(x)
    part = max(1, len(x) * _SCRATCH // x.numel()) if x.dim() else 0
    # a number from itself is 0 if it is finite, else NaN; the norm of order 0 counts what is not 0
    bad = [torch.linalg.vector_norm(p - p, 0, dtype=dtype) for p in (x.split(part) if part else (x,))]
    norm, peak = (torch.linalg.vector_norm(x, order, dtype=dtype) for order in (2, math.inf))
    found = torch.stack((norm, peak, bad[0] if len(bad) == 1 else torch.stack(bad).sum())).float()
    found[:1].square_()
    return found


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


def _fingerprint(x: Tensor) -> float:
    """`_hash` of a tensor on a CPU that numpy cannot read."""
    bits = x.detach().resolve_neg().view(_BITS[x.element_size()])
    return _hash(bits.reshape(-1)[:: max(1, bits.numel() // _SAMPLE)][:_SAMPLE].numpy())


def fingerprints(xs: Sequence[Tensor]) -> Tensor:
    """`_hash` of every tensor on an accelerator: ``(tensor,)`` int32.

    Args:
        xs: on one device; not empty. Read only.

    Cost: three operations for tensors of which as many words are read, one more if there are several.
    """
    words = [_words(x) for x in xs]
    kinds: dict[torch.Size, list[int]] = {}
    for i, w in enumerate(words):
        kinds.setdefault(w.shape, []).append(i)
    found: list[Tensor] = [words[0]] * len(words)
    for shape, at in kinds.items():
        some = words[at[0]].unsqueeze(0) if len(at) == 1 else torch.stack([words[i] for i in at])
        # bits 8 to 31 of the sum stand in bits 0 to 23 of the upper half, where they can be read without a shift
        total = (some * _weights_on(words[0].device)[: shape.numel()].view(shape)).flatten(1).sum(1)
        marks = (total & (0xFFFFFF << 32)).view(torch.int32)[1::2]
        for i, mark in zip(at, marks.unbind(), strict=True):
            found[i] = mark
    return marks if len(kinds) == 1 else torch.stack(found)  # pyright: ignore[reportPossiblyUnboundVariable]


def _words(x: Tensor) -> Tensor:
    """The bits of evenly spaced elements as integers: ``(element,)``, of 8 bytes ``(element, 2)``."""
    bits = x.detach().resolve_neg().view(_BITS[x.element_size()]).reshape(-1)
    every = max(1, bits.numel() // _SAMPLE)
    if bits.element_size() == 8:
        bits = bits.view(torch.int32).view(-1, 2)
    return bits[::every][:_SAMPLE]


@lru_cache(maxsize=8)
def _weights_on(device: torch.device) -> Tensor:
    """``(2 * _SAMPLE,)`` int64: `_weights`, of which those of fewer are the first, 24 bits higher."""
    return torch.from_numpy(_weights(2 * _SAMPLE).astype(np.int64) << 24).to(device, non_blocking=True)


@cache
def _weights(n: int) -> np.ndarray:
    """Fixed odd factors of 32 bits that have nothing to do with each other, so that swapped elements change the sum."""
    return np.random.default_rng(0).integers(0, 1 << 31, n, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
