"""Norm, extremes, non-finite values and element spikes of every gradient, in cache-sized groups.

Source: SPAM (Huang et al., 2025): an element is spiked if g^2 > Theta v with v Adam's second moment before the step and
Theta = 5000. Seen after the step, with v' = b2 v + (1 - b2) g^2, that is g^2 (b2 + Theta (1 - b2)) > Theta v' (exact
algebra). We use the bias-corrected v, so Theta is divided by 1 - b2^(n-1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from monitor.record.passes.dtype import sum_dtype

STATS = ("norm", "max_abs", "nonfinite", "spikes", "spike_ratio")
THETA = 5000.0
#: Updates before the second moment says anything (SPAM's own warm-up).
WARMUP = 20
#: Second moment before the step, as a share of the one after it, below which float32 has lost it. It was 0 (the first
#: gradient an element ever had) or the spike is beyond 1e6 / (1 - beta2) times it: the mean over the rest of the tensor
#: decides which.
_LOST = 1e-6
_TINY = torch.finfo(torch.float32).tiny


def gradient_stats(grads: Sequence[Tensor]) -> Tensor | np.ndarray:
    """Norm, largest absolute value and count of non-finite elements of each tensor.

    Args:
        grads: dense floating tensors of one device, none of them empty; read only.

    Returns:
        ``(tensor, 3)``: float64 array on a CPU, float32 tensor elsewhere. The norm is right down to elements of 1e-38
        (rescaled by the largest element where float32 squares underflow) and is infinite only if an element is, or the
        true norm exceeds 3.4e38.

    Cost: two reads of each gradient; no host sync on an accelerator.
    Source: definition; underflow measured (the float32 norm of 1,000 x 1e-24 is 0).
    """
    if grads[0].device.type == "cpu":
        return _on_cpu(grads)
    extremes = [torch.aminmax(g) for g in grads]
    low = torch.stack([e[0] for e in extremes]).float()
    high = torch.stack([e[1] for e in extremes]).float()
    peak = torch.maximum(-low, high)
    bad = torch.stack([(~torch.isfinite(g)).sum() for g in grads]).float()
    wide = torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32
    norm = torch.stack(torch._foreach_norm(list(grads), 2, dtype=wide)).float()
    scaled = torch._foreach_div([g.float() for g in grads], list(peak.clamp_min(_TINY).unbind()))
    exact = torch.stack(torch._foreach_norm(scaled)) * peak
    norm = torch.where(torch.isfinite(peak) & (peak > 0), exact, norm)
    return torch.stack((norm, peak, bad), dim=1)


def _on_cpu(grads: Sequence[Tensor]) -> np.ndarray:
    out = np.zeros((len(grads), 3))
    # each tensor is read twice in a row, the second time from cache if it fits; one conversion for all results
    if all(g.dtype == torch.float32 for g in grads):
        read = [t for g in grads for t in (torch.linalg.vector_norm(g), *g.aminmax())]
    else:
        read = [t.float() for g in grads for t in (torch.linalg.vector_norm(g, dtype=sum_dtype(g)), *g.aminmax())]
    norm, low, high = torch.stack(read).numpy().reshape(-1, 3).T
    out[:, 0], out[:, 1] = norm, np.maximum(-low, high)
    # squares of elements below 1e-19 lose bits in float32, above 1.8e19 they overflow
    odd = ~np.isfinite(norm) | ((norm < 1e-15) & (out[:, 1] > 0))
    for i in np.flatnonzero(odd).tolist():
        if math.isfinite(out[i, 1]):
            out[i, 0] = float(torch.linalg.vector_norm(grads[i], dtype=torch.float64))
        else:
            out[i, 2] = float((~torch.isfinite(grads[i])).sum())
    return out


def spike_stats(
    grads: Sequence[Tensor], seconds: Sequence[Tensor], beta2: float, n: float, scratch: Scratch
) -> Tensor | np.ndarray:
    """Spiked elements of each gradient, from Adam's second moment after the step.

    Args:
        grads: gradients the optimizer used, dense, of one device.
        seconds: their second moments after the step (``exp_avg_sq``), of the same shapes.
        beta2: decay of the second moment.
        n: updates in it including this one; at least 2.
        scratch: reused between steps.

    Returns:
        ``(tensor, 2)``, float64 array on a CPU, else float32 tensor: number of spiked elements, and the largest g^2 / v
        (bias-corrected v before the step) among them, 0 if there is none. Where v is lost to rounding (see `_LOST`) the
        tensor's mean stands in for it.

    Cost: on a CPU two reads and two cached passes that decide whether anything is spiked; more only where something
    is. On an accelerator always the full computation, without a sync.
    Source: SPAM, module docstring.
    """
    correction = 1 - beta2 ** (n - 1)
    theta = THETA / correction
    slope = (beta2 + theta * (1 - beta2)) / theta  # spiked: v' < slope g^2
    if grads[0].device.type != "cpu":
        return torch.stack([_on_device(g, v, beta2, correction, slope) for g, v in zip(grads, seconds, strict=True)])
    out = np.zeros((len(grads), 2))
    for group in scratch.groups(grads):
        g, v = scratch.flat([grads[i] for i in group], [seconds[i] for i in group])
        # one multiply-add and one minimum decide for the whole group
        short = torch.addcmul(v, g, g, value=-slope, out=scratch.room(g.numel(), g.dtype))
        if float(short.amin()) < 0:
            _count(out, group, [grads[i].numel() for i in group], short, g, v, beta2, correction)
    return out


def _count(
    out: np.ndarray, group: Sequence[int], sizes: Sequence[int], short: Tensor, g: Tensor, v: Tensor, beta2: float,
    correction: float,
) -> None:  # fmt: skip
    """Count the elements with ``short < 0`` for each tensor of a group, on a CPU."""
    # numpy: several times faster than torch on so little data, and torch's nonzero is slow on a CPU
    gradient, second = g.numpy(), v.numpy()
    at = np.flatnonzero(short.numpy() < 0)
    begin = 0
    for i, size in zip(group, sizes, strict=True):
        mine = at if len(group) == 1 else at[(at >= begin) & (at < begin + size)]
        if mine.size:
            square, now = np.square(gradient[mine].astype(np.float64)), second[mine].astype(np.float64)
            before = (now - (1 - beta2) * square) / beta2
            lost = before <= _LOST * now
            if lost.any():
                rest = float(second[begin : begin + size].sum()) - float(now.sum())
                before[lost] = rest / max(1, size - mine.size)
            ratio = square * correction / np.maximum(before, np.finfo(np.float64).tiny)
            spiked = (ratio > THETA) & (before > 0)
            out[i, 0], out[i, 1] = int(spiked.sum()), float(ratio[spiked].max(initial=0))
        begin += size


def _on_device(g: Tensor, v: Tensor, beta2: float, correction: float, slope: float) -> Tensor:
    square, second = g.double().square(), v.double()
    tripped = second < slope * square
    before = (second - (1 - beta2) * square).div_(beta2)
    rest = torch.where(tripped, 0.0, second).sum() / (~tripped).sum().clamp_min(1)
    before = torch.where(before <= _LOST * second, rest, before)
    ratio = square * correction / before.clamp_min(torch.finfo(torch.float64).tiny)
    spiked = tripped & (ratio > THETA) & (before > 0)
    return torch.stack((spiked.sum().double(), torch.where(spiked, ratio, 0.0).max())).float()


class Scratch:
    """Buffers of `spike_stats`, and how small tensors are put together so that one call serves many.

    Tensors of up to `SMALL` elements are copied side by side into groups of at most `GROUP`; larger ones stand alone.
    """

    SMALL, GROUP = 1 << 12, 1 << 16

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._groups: dict[tuple[int, ...], list[list[int]]] = {}

    def groups(self, tensors: Sequence[Tensor]) -> list[list[int]]:
        """Indices of the tensors that are handled together."""
        sizes = tuple(t.numel() for t in tensors)
        known = self._groups.get(sizes)
        if known is None:
            found: list[list[int]] = []
            small: list[int] = []
            for i, size in enumerate(sizes):
                if size > self.SMALL:
                    found.append([i])
                    continue
                if small and sum(sizes[j] for j in small) + size > self.GROUP:
                    found.append(small)
                    small = []
                small.append(i)
            known = self._groups[sizes] = [*found, *([small] if small else [])]
        return known

    def room(self, n: int, dtype: torch.dtype, name: str = "square") -> Tensor:
        """``(n,)`` uninitialised elements, the same memory each time."""
        held = self._buffers.get((name, dtype))
        if held is None or held.numel() < n:
            held = self._buffers[(name, dtype)] = torch.empty(n, dtype=dtype)
        return held[:n]

    def flat(self, grads: Sequence[Tensor], seconds: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Both lists as one vector each: a view of a single tensor, or a copy of several."""
        if len(grads) == 1:
            return grads[0].reshape(-1), seconds[0].reshape(-1)
        total = sum(g.numel() for g in grads)
        a, b = self.room(total, grads[0].dtype, "grads"), self.room(total, seconds[0].dtype, "seconds")
        torch.cat([g.reshape(-1) for g in grads], out=a)
        torch.cat([v.reshape(-1) for v in seconds], out=b)
        return a, b
