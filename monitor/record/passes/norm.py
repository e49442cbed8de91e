"""What goes into a normalisation layer, how even it is over the tokens, and the layer's gain."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from monitor.record.passes.dtype import sum_dtype
from monitor.record.passes.middle import ends_and_middle

STATS = (
    "rms_mean", "rms_max", "rms_median", "sigma_mean", "sigma_std", "sigma_first", "firsts", "tokens", "gain_min",
    "gain_median", "gain_max",
)  # fmt: skip
INPUT, GAIN = slice(0, 8), slice(8, 11)
#: Those of an input that say how its tokens are, and those that say how many they are, which the host knows.
SIZES, COUNTS = slice(0, 6), slice(6, 8)
#: Most numbers that are sorted at once on an accelerator: some 20 MiB.
MOST = 1 << 20


def norm_stats(x: Tensor, centred: bool) -> np.ndarray:
    """The statistics ``STATS[INPUT]`` of one input.

    Args:
        x: ``(token, feature)`` or ``(batch, token, …, feature)`` floating, not empty, on a CPU; read only.
        centred: True if the layer subtracts the mean (LayerNorm), False if it does not (RMSNorm).

    Returns:
        ``(8,)`` float64: mean, largest and median of the tokens' root mean squares; of what the layer divides by (the
        standard deviation, or the root mean square), mean and standard deviation over all tokens but the first of each
        sequence, and the mean over those first ones; how many of these there are (an input without sequences has
        none), and how many tokens.

    Cost: one read of ``x``, two if ``centred``.
    Source: definition.
    """
    kept = norm_sizes(x, centred)
    rms = kept.norms / math.sqrt(x.shape[-1])
    sigma = rms
    if kept.means is not None:
        sigma = (rms.square() - kept.means.square()).clamp_min_(0).sqrt_()
    first, rest = (sigma[:, :1], sigma[:, 1:]) if kept.firsts else (sigma[:0], sigma)
    r, f, s = (t.double().numpy().ravel() for t in (rms, first, rest))
    with np.errstate(all="ignore"):
        start = f.mean() if f.size else 0.0
        return np.array([r.mean(), r.max(), np.median(r), s.mean(), s.std(), start, f.size, r.size])


@dataclass(frozen=True)
class InputSizes:
    """What is kept of one input: its tokens' norms and, of a layer that subtracts them, means.

    Attributes:
        norms: ``(token)`` or ``(batch, token, …)`` float32, or float64 of an input in that.
        means: the same; None if the layer does not subtract them.
        features: that each token has.
    """

    norms: Tensor
    means: Tensor | None
    features: int

    @property
    def firsts(self) -> int:
        """Tokens at the beginning of a sequence; 0 where there are no sequences."""
        return self.norms[:, :1].numel() if self.norms.dim() > 1 and self.norms.shape[1] > 1 else 0

    @property
    def counts(self) -> tuple[int, int]:
        """The statistics ``STATS[COUNTS]``."""
        return self.firsts, self.norms.numel()

    @property
    def kind(self) -> Hashable:
        """Inputs of one kind can be read together."""
        return self.norms.device, self.norms.shape, self.features, self.means is None


def norm_sizes(x: Tensor, centred: bool) -> InputSizes:
    """What `input_stats` is computed from; arguments and cost are those of `norm_stats`."""
    x = x.detach()
    norms = torch.linalg.vector_norm(x, dim=-1, dtype=sum_dtype(x))
    return InputSizes(norms, x.mean(-1, dtype=sum_dtype(x)) if centred else None, x.shape[-1])


def input_stats(kept: Sequence[InputSizes]) -> Tensor:
    """The statistics ``STATS[SIZES]`` of several inputs of one kind on an accelerator.

    Returns:
        ``(input, 6)`` float32, as `norm_stats`.

    Cost: some 25 launches for `MOST` tokens; no host sync.
    """
    together = max(1, MOST // kept[0].norms.numel())
    parts = [_input_stats(kept[i : i + together]) for i in range(0, len(kept), together)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _input_stats(kept: Sequence[InputSizes]) -> Tensor:
    rms = torch.stack([k.norms for k in kept]) / math.sqrt(kept[0].features)
    sigma, means = rms, [k.means for k in kept if k.means is not None]
    if means:
        sigma = (rms.square() - torch.stack(means).square_()).clamp_min_(0).sqrt_()
    ends = ends_and_middle(rms.flatten(1))
    rest = sigma[:, :, 1:] if kept[0].firsts else sigma
    tokens = tuple(range(1, sigma.dim()))
    start = sigma[:, :, :1].mean(tokens) if kept[0].firsts else torch.zeros_like(ends[:, 0])
    found = (rms.mean(tokens), ends[:, 2], ends[:, 1], rest.mean(tokens), rest.std(tokens, correction=0), start)
    return torch.stack(found, 1).float()


def gain_stats(weight: Tensor, offset: Tensor | float = 0.0) -> np.ndarray:
    """The statistics ``STATS[GAIN]``: smallest, median and largest magnitude of ``weight + offset``.

    Args:
        weight: ``(feature,)`` floating, on a CPU; read only.
        offset: what the layer adds to its weight to make its gain: 0, or 1 where the weight begins at 0.

    Returns:
        ``(3,)`` float64.

    Cost: a vector.
    Source: definition.
    """
    a = (weight.detach().float() + offset).abs().numpy().astype(np.float64)
    return np.array([a.min(), np.median(a), a.max()])


def gains_stats(weights: Sequence[Tensor], offsets: Sequence[Tensor]) -> Tensor:
    """The statistics ``STATS[GAIN]`` of several weights of one length on an accelerator.

    Args:
        weights: each ``(feature,)`` floating; read only.
        offsets: for each what is added to it, as in `gain_stats`, of no dimension; none, if nothing is.

    Returns:
        ``(weight, 3)`` float32.

    Cost: some 10 launches; no host sync.
    """
    gains = torch.stack(list(weights)).float()
    if offsets:
        gains = gains + torch.stack(list(offsets))[:, None]
    return ends_and_middle(gains.abs())


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
