"""Size, tails and outlier channels of a block's output: the residual stream as it leaves the block."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from monitor.record.passes.dtype import sum_dtype

STATS = ("rms", "max_abs", "std", "kurtosis", "median", "massive", "nonfinite", "rows")

#: Rows read for what needs a fourth power or an order; size, extremes and non-finite values come from all rows.
ROWS = 64
#: A channel is massive if its largest magnitude exceeds 100 and is 1,000 times the median magnitude: Sun et al. (2024),
#: Massive Activations in Large Language Models (arXiv 2402.17762), sec. 2.
MASSIVE, MASSIVE_RATIO = 100.0, 1000.0


def stream_stats(x: Tensor, start: int = 0) -> Tensor | list[float]:
    """The statistics `STATS` of one output.

    Args:
        x: ``(…, channel)`` floating, not empty; read only.
        start: first of the evenly spaced rows that are sampled, below the number of rows.

    Returns:
        8 numbers on a CPU, a float32 tensor ``(8,)`` elsewhere: root mean square, largest magnitude (NaN if any element
        is), standard deviation and kurtosis (3 for a normal distribution; 0 / 0 is NaN) and median magnitude of the
        sampled rows, massive channels, elements that are NaN or infinite, rows sampled.

    Cost: three reads of ``x`` (four when something in it is not finite); no host sync on an accelerator.
    Source: definition; `MASSIVE` for massive channels.
    """
    rows = x.detach().reshape(-1, x.shape[-1])
    stride = max(1, rows.shape[0] // ROWS) | 1  # odd: over a length that is a power of two every position is met
    some = rows[start % stride :: stride][:ROWS]
    norm = torch.linalg.vector_norm(rows, dtype=sum_dtype(x))
    peaks = torch.maximum(rows.amax(0), rows.amin(0).neg())
    if x.device.type != "cpu":
        return _on_device(rows, some.float(), norm, peaks.float())
    size = float(norm)
    bad = 0.0 if math.isfinite(size) else float((~torch.isfinite(rows)).sum())
    with np.errstate(all="ignore"):
        a = some.double().numpy().ravel()
        d = a - a.mean()
        np.square(d, out=d)
        variance = float(d.mean())
        kurtosis = float(np.float64(d @ d) / a.size / np.float64(variance) ** 2)
        median = float(np.median(np.abs(a)))
        massive = float((peaks.float().numpy() > max(MASSIVE, MASSIVE_RATIO * median)).sum())
    rms = size / math.sqrt(rows.numel())
    return [rms, float(peaks.max()), math.sqrt(variance), kurtosis, median, massive, bad, float(some.shape[0])]


def _on_device(rows: Tensor, some: Tensor, norm: Tensor, peaks: Tensor) -> Tensor:
    """The same formula on an accelerator, where nothing may be waited for."""
    variance, mean = torch.var_mean(some, correction=0)
    scale = variance.sqrt()
    kurtosis = ((some - mean) / scale).square().square().mean()
    median = some.abs().median()
    massive = (peaks > (MASSIVE_RATIO * median).clamp_min(MASSIVE)).sum()
    bad = (~torch.isfinite(rows)).sum()
    count = torch.full_like(scale, some.shape[0])
    values = (norm / math.sqrt(rows.numel()), peaks.max(), scale, kurtosis, median, massive, bad, count)
    return torch.stack([v.float() for v in values])
