"""Size, tails and outlier channels of a block's output: the residual stream as it leaves the block."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from monitor.record.passes.dtype import sum_dtype
from monitor.record.passes.middle import ends_and_middle

STATS = ("rms", "max_abs", "std", "kurtosis", "median", "massive", "nonfinite", "rows")
#: Those that are read from an output, and how many rows they are of, which the host knows.
READ, COUNTED = slice(0, 7), slice(7, 8)

#: Rows read for what needs a fourth power or an order; size, extremes and non-finite values come from all rows.
ROWS = 64
#: Most numbers that are sorted at once on an accelerator: some 50 MiB.
MOST = 1 << 21
#: A channel is massive if its largest magnitude exceeds 100 and is 1,000 times the median magnitude: Sun et al. (2024),
#: Massive Activations in Large Language Models (arXiv 2402.17762), sec. 2.
MASSIVE, MASSIVE_RATIO = 100.0, 1000.0


def stream_stats(x: Tensor, start: int = 0) -> list[float]:
    """The statistics `STATS` of one output.

    Args:
        x: ``(…, channel)`` floating, not empty, on a CPU; read only.
        start: first of the evenly spaced rows that are sampled, below the number of rows.

    Returns:
        8 numbers: root mean square, largest magnitude (NaN if any element is), standard deviation and kurtosis (3 for a
        normal distribution; 0 / 0 is NaN) and median magnitude of the sampled rows, massive channels, elements that are
        NaN or infinite, rows sampled.

    Cost: three reads of ``x`` (four when something in it is not finite).
    Source: definition; `MASSIVE` for massive channels.
    """
    rows, some = _rows(x, start)
    norm = torch.linalg.vector_norm(rows, dtype=sum_dtype(x))
    peaks = torch.maximum(rows.amax(0), rows.amin(0).neg())
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


def _rows(x: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """All rows, ``(row, channel)``, and those that are sampled."""
    rows = x.detach().reshape(-1, x.shape[-1])
    stride = max(1, rows.shape[0] // ROWS) | 1  # odd: over a length that is a power of two every position is met
    return rows, rows[start % stride :: stride][:ROWS]


@dataclass(frozen=True)
class OutputSizes:
    """What is kept of one output on an accelerator.

    Attributes:
        norm: of all of it.
        peaks: ``(channel,)`` largest magnitudes, NaN if any is.
        bad: elements that are NaN or infinite.
        some: ``(row, channel)`` float32: the sampled rows.
        count: elements of the whole.
    """

    norm: Tensor
    peaks: Tensor
    bad: Tensor
    some: Tensor
    count: int

    @property
    def kind(self) -> Hashable:
        """Outputs of one kind can be read together."""
        return self.some.device, self.some.shape, self.count


def output_sizes(x: Tensor, start: int = 0) -> OutputSizes:
    """What `output_stats` is computed from; arguments are those of `stream_stats`.

    Cost: four reads of ``x``, five launches; no host sync.
    """
    rows, some = _rows(x, start)
    wide = sum_dtype(x)
    return OutputSizes(
        norm=torch.linalg.vector_norm(rows, dtype=wide),
        peaks=torch.linalg.vector_norm(rows, math.inf, dim=0, dtype=wide),
        bad=torch.linalg.vector_norm(rows * 0, 0, dtype=wide),  # of what is not finite, 0 times is NaN
        some=some.to(torch.float32, copy=True),
        count=rows.numel(),
    )


def output_stats(kept: Sequence[OutputSizes]) -> Tensor:
    """The statistics ``STATS[READ]`` of several outputs of one kind on an accelerator.

    Returns:
        ``(output, 7)`` float32, as `stream_stats`.

    Cost: some 30 launches for `MOST` sampled elements; no host sync.
    """
    together = max(1, MOST // kept[0].some.numel())
    parts = [_output_stats(kept[i : i + together]) for i in range(0, len(kept), together)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _output_stats(kept: Sequence[OutputSizes]) -> Tensor:
    some, peaks = torch.stack([k.some for k in kept]).flatten(1), torch.stack([k.peaks for k in kept])
    variance, mean = torch.var_mean(some, 1, correction=0, keepdim=True)
    scale = variance.sqrt()
    kurtosis = ((some - mean) / scale).pow_(4).mean(1)
    median = ends_and_middle(some.abs())[:, 1]
    least = (MASSIVE_RATIO * median).nan_to_num_(nan=0.0, posinf=math.inf).clamp_min_(MASSIVE)
    massive = (peaks > least[:, None]).sum(1)
    rms = torch.stack([k.norm for k in kept]) / math.sqrt(kept[0].count)
    bad = torch.stack([k.bad for k in kept])
    return torch.stack((rms, peaks.amax(1), scale[:, 0], kurtosis, median, massive, bad), 1).float()
