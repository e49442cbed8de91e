"""How far gradients only ask their tensors to grow: the inner product of both, for every parameter.

Source: Prieto et al. (2025), Grokking at the Edge of Numerical Stability, section 4.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from monitor.record.passes.dtype import sum_dtype

STATS = ("dot", "grad_norm", "param_norm")
#: Elements that are handled together: on a CPU they stay in cache, on an accelerator they bound what is widened.
_PIECE, _LARGE = 1 << 16, 1 << 26
#: Sum of squares below which float32 may have lost elements, whose squares end at 1e-38.
_LEAST = 1e-25


def alignment_stats(grads: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
    """The statistics `STATS` of each parameter.

    Args:
        grads: dense and floating, none of them empty, of one device and dtype; read only.
        params: the parameters at which they were taken, each of its gradient's shape, of one dtype; read only.

    Returns:
        ``(parameter, 3)`` float64: inner product, norm of the gradient, norm of the parameter. Right down to gradients
        of 1e-38, which are usual where a softmax has collapsed.

    Cost: one read of both; no host sync. On a CPU several are copied side by side as float64, so that one call serves
    all: give small ones together and a large one alone. Of that, inner products of pieces are taken in the wider of
    float32 and the tensors' own dtype and added in float64.
    Source: module docstring.
    """
    if grads[0].device.type == "cpu":
        if len(grads) > 1:
            return _side_by_side(grads, params)
        return torch.tensor([_read(grads[0], params[0])], dtype=torch.float64)
    return on_device(grads, params)


def on_device(grads: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
    """`alignment_stats` as it is done on an accelerator."""
    dots = [_dot(g, w) for g, w in zip(grads, params, strict=True)]
    norms = [torch.stack(torch._foreach_norm(list(t), 2, dtype=torch.float64)) for t in (grads, params)]
    return torch.stack((torch.stack(dots), *norms), dim=1)


def _dot(g: Tensor, w: Tensor) -> Tensor:
    dtype = torch.promote_types(sum_dtype(g), sum_dtype(w))
    pieces = zip(g.reshape(-1).split(_LARGE), w.reshape(-1).split(_LARGE), strict=True)
    return torch.stack([a.to(dtype).dot(b.to(dtype)) for a, b in pieces]).double().sum()


def _side_by_side(grads: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
    g, w = (torch.cat([t.detach().reshape(-1) for t in some]).double().numpy() for some in (grads, params))
    begins = np.cumsum([0, *(t.numel() for t in grads[:-1])])
    with np.errstate(all="ignore"):
        dot, gg, ww = (np.add.reduceat(product, begins) for product in (g * w, g * g, w * w))
        return torch.from_numpy(np.stack((dot, np.sqrt(gg), np.sqrt(ww)), axis=1))


def _read(g: Tensor, w: Tensor) -> tuple[float, float, float]:
    dtype = torch.promote_types(sum_dtype(g), sum_dtype(w))
    g, w = g.reshape(-1), w.reshape(-1)
    dot, gg, ww = _sums(g, w, dtype)
    if not (gg >= _LEAST and ww >= _LEAST and max(gg, ww) < math.inf):
        dot, gg, ww = _sums(g, w, torch.float64)
    return dot, math.sqrt(gg), math.sqrt(ww)


def _sums(g: Tensor, w: Tensor, dtype: torch.dtype) -> tuple[float, float, float]:
    dot = gg = ww = 0.0
    for a, b in zip(g.split(_PIECE), w.split(_PIECE), strict=True):
        a, b = a.to(dtype), b.to(dtype)
        dot += a.dot(b).item()
        gg += a.dot(a).item()
        ww += b.dot(b).item()
    return dot, gg, ww
