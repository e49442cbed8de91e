"""How far gradients only ask their tensors to grow: the inner product of both, for every parameter.

Source: Prieto et al. (2025), Grokking at the Edge of Numerical Stability, section 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from monitor.record.passes.side_by_side import SideBySide, norms

STATS = ("dot", "grad_norm", "param_norm")


def alignment_stats(grads: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
    """The statistics `STATS` of each parameter on an accelerator; `parameter.ParameterReader` has those on a CPU.

    Args:
        grads: dense and floating, none of them empty, of one device and dtype; read only.
        params: the parameters at which they were taken, each of its gradient's shape, of one dtype; read only.

    Returns:
        ``(parameter, 3)`` float64 where the device has it, else float32: inner product, norm of the gradient, norm of
        the parameter. Products are rounded to the wider of float32 and the parameters' own dtype and added in the
        widest dtype of the device: those below 1e-38 are lost.

    Cost: three reads of both; no host sync, and no operation that there is one of for each tensor.
    Source: module docstring.
    """
    layout = SideBySide([g.numel() for g in grads])
    positive, absolute = [], []
    for sizes, product, g in layout.copies(params, grads):
        parts = product.mul_(g).split(sizes)
        absolute.append(norms(parts, 1))
        product.clamp_min_(0)
        positive.append(norms(parts, 1))
    dots = 2 * layout.joined(positive) - layout.joined(absolute)
    return torch.stack((dots, norms(grads, 2), norms(params, 2)), dim=1)
