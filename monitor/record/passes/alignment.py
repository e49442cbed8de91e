"""How far gradients only ask their tensors to grow: the inner product of both, for every parameter.

Source: Prieto et al. (2025), Grokking at the Edge of Numerical Stability, section 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from monitor.record.passes.dtype import sum_dtype

STATS = ("dot", "grad_norm", "param_norm")
#: Elements that are widened together.
_LARGE = 1 << 26


def alignment_stats(grads: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
    """The statistics `STATS` of each parameter on an accelerator; `parameter.ParameterReader` has those on a CPU.

    Args:
        grads: dense and floating, none of them empty, of one device and dtype; read only.
        params: the parameters at which they were taken, each of its gradient's shape, of one dtype; read only.

    Returns:
        ``(parameter, 3)`` float64: inner product, norm of the gradient, norm of the parameter. Inner products of pieces
        are taken in the wider of float32 and the tensors' own dtype and added in float64.

    Cost: one read of both, and one more for the norms; no host sync.
    Source: module docstring.
    """
    dots = [_dot(g, w) for g, w in zip(grads, params, strict=True)]
    norms = [torch.stack(torch._foreach_norm(list(t), 2, dtype=torch.float64)) for t in (grads, params)]
    return torch.stack((torch.stack(dots), *norms), dim=1)


def _dot(g: Tensor, w: Tensor) -> Tensor:
    dtype = torch.promote_types(sum_dtype(g), sum_dtype(w))
    pieces = zip(g.reshape(-1).split(_LARGE), w.reshape(-1).split(_LARGE), strict=True)
    return torch.stack([a.to(dtype).dot(b.to(dtype)) for a, b in pieces]).double().sum()
