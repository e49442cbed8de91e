"""What goes into a normalisation layer, how even it is over the tokens, and the layer's gain."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

STATS = (
    "rms_mean", "rms_max", "rms_median", "sigma_mean", "sigma_std", "sigma_first", "firsts", "tokens", "gain_min",
    "gain_median", "gain_max",
)  # fmt: skip
INPUT, GAIN = slice(0, 8), slice(8, 11)


def norm_stats(x: Tensor, centred: bool) -> Tensor | np.ndarray:
    """The statistics ``STATS[INPUT]`` of one input.

    Args:
        x: ``(token, feature)`` or ``(batch, token, …, feature)`` floating, not empty; read only.
        centred: True if the layer subtracts the mean (LayerNorm), False if it does not (RMSNorm).

    Returns:
        ``(8,)``, float64 array on a CPU, float32 tensor elsewhere: mean, largest and median of the tokens' root mean
        squares; of what the layer divides by (the standard deviation, or the root mean square), mean and standard
        deviation over all tokens but the first of each sequence, and the mean over those first ones; how many of
        these there are (an input without sequences has none), and how many tokens.

    Cost: one read of ``x``, two if ``centred``; no host sync on an accelerator.
    Source: definition.
    """
    x = x.detach()
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rms = torch.linalg.vector_norm(x, dim=-1, dtype=wide) / math.sqrt(x.shape[-1])
    sigma = rms
    if centred:
        sigma = (rms.square() - x.mean(-1, dtype=wide).square()).clamp_min_(0).sqrt_()
    first, rest = (sigma[:, :1], sigma[:, 1:]) if x.dim() > 2 and x.shape[1] > 1 else (sigma[:0], sigma)
    if x.device.type == "cpu":
        r, f, s = (t.double().numpy().ravel() for t in (rms, first, rest))
        with np.errstate(all="ignore"):
            start = f.mean() if f.size else 0.0
            return np.array([r.mean(), r.max(), np.median(r), s.mean(), s.std(), start, f.size, r.size])
    start = first.mean() if first.numel() else torch.zeros_like(rms.mean())
    values = (rms.mean(), rms.max(), rms.median(), rest.mean(), rest.std(correction=0), start)
    counts = (torch.full_like(start, first.numel()), torch.full_like(start, rms.numel()))
    return torch.stack([v.float() for v in (*values, *counts)])


def gain_stats(weight: Tensor, offset: Tensor | float = 0.0) -> Tensor | np.ndarray:
    """The statistics ``STATS[GAIN]``: smallest, median and largest magnitude of ``weight + offset``.

    Args:
        weight: ``(feature,)`` floating; read only.
        offset: what the layer adds to its weight to make its gain: 0, or 1 where the weight begins at 0.

    Returns:
        ``(3,)``, float64 array on a CPU, float32 tensor elsewhere.

    Cost: a vector; no host sync on an accelerator.
    Source: definition.
    """
    gain = (weight.detach().float() + offset).abs()
    if gain.device.type == "cpu":
        a = gain.numpy().astype(np.float64)
        return np.array([a.min(), np.median(a), a.max()])
    return torch.stack((gain.min(), gain.median(), gain.max()))


def gain_offset(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """0 or 1, whichever added to ``weight`` explains the size of the output better.

    Args:
        x: ``(token, feature)`` input of a layer that normalises; a few tokens are enough.
        y: its output, of the same shape.
        weight: ``(feature,)`` of the layer.
        bias: ``(feature,)``, if it has one.

    Returns:
        0-d float32 on the device of ``x``.

    Source: some RMSNorms multiply by 1 + weight (Gemma), most by weight; which one is visible in what they do.
    """
    x, y, w = x.detach().float(), y.detach().float(), weight.detach().float()
    y = y if bias is None else y - bias.detach().float()
    unit = (x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)).square().sum(0) * x.shape[-1]
    power = y.square().sum()
    plain, shifted = ((unit * (w + c).square()).sum() for c in (0.0, 1.0))
    return ((shifted - power).abs() < (plain - power).abs()).float()
