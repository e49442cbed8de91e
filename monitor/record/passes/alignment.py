"""How far a gradient only asks its tensor to grow: the inner product of both, for every parameter.

Source: Prieto et al. (2025), Grokking at the Edge of Numerical Stability, section 4.2.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from monitor.record.passes.dtype import sum_dtype

STATS = ("dot", "grad_norm", "param_norm")
#: Elements that are handled together and stay in cache.
_PIECE = 1 << 16
#: Below this largest element the squares of float32 lose bits.
_LEAST = 1e-15


def alignment_stats(grad: Tensor, param: Tensor) -> Tensor | tuple[float, float, float]:
    """The statistics `STATS` of one parameter.

    Args:
        grad: its gradient, dense and floating; read only.
        param: the parameter at which the gradient was taken, of the same shape and device; read only.

    Returns:
        ``(3,)``: inner product, norm of the gradient, norm of the parameter; numbers on a CPU, else a float64 tensor.

    Cost: one read of both. Products are taken in the wider of float32 and the tensors' own dtype and summed in float64.
    Source: module docstring.
    """
    if grad.device.type != "cpu":
        g, w = grad.double(), param.double()
        return torch.stack(((g * w).sum(), g.norm(), w.norm()))
    dtype = torch.promote_types(sum_dtype(grad), sum_dtype(param))
    g, w = (t.detach().to(dtype).reshape(-1).numpy() for t in (grad, param))
    if g.size and float(np.abs(g[:_PIECE]).max()) < _LEAST:
        g = g.astype(np.float64)
    sums = np.zeros(3)
    work = np.empty(min(g.size, _PIECE), np.result_type(g, w))
    with np.errstate(all="ignore"):
        for begin in range(0, g.size, _PIECE):
            a, b = g[begin : begin + _PIECE], w[begin : begin + _PIECE]
            for i, (x, y) in enumerate(((a, b), (a, a), (b, b))):
                sums[i] += np.multiply(x, y, out=work[: a.size]).sum(dtype=np.float64)
    return float(sums[0]), float(np.sqrt(sums[1])), float(np.sqrt(sums[2]))
