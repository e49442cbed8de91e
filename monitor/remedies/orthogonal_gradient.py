"""The orthogonal gradient (⊥Grad): remove from each tensor's gradient the part that only scales the tensor up.

Once every sample is fitted, growing all weights along themselves lowers the loss without changing any prediction. That
direction leads to softmax collapse; without it the same optimizer goes on to generalise.

Source: Prieto, Barsbey, Mediano, Birdal (2025), "Grokking at the Edge of Numerical Stability", arXiv 2501.04697,
eq. 12.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from monitor.errors import UsageError
from monitor.remedies._gradients import before_update

# The official code's guard against division by zero.
_TINY = 1e-30


@torch.no_grad()
def orthogonalize_gradients_(parameters: Iterable[Tensor], *, rescale: bool = True) -> None:
    """Replace every gradient by its part orthogonal to its own tensor, in place.

    ``g ← g - (⟨w,g⟩ / ⟨w,w⟩)·w`` for each tensor by itself, all its elements taken as one vector. Call it after the
    backward pass, unscaling and clipping, and before the step. Tensors without a gradient are left alone.

    Args:
        parameters: tensors whose ``.grad`` is dense and real.
        rescale: True multiplies the result back to ``‖g‖``, as the official code does; False is the paper's equation.
            A gradient that is parallel to its tensor up to rounding becomes 0 either way: one with a single element
            always is, so leave such tensors out.

    Raises:
        UsageError: for a sparse or complex gradient.

    Cost: five passes over each gradient and two temporary copies of the largest one; no host sync.
    Numerics: in float32, or float64 for float64 tensors. Gradients are divided by their largest magnitude first, so
        that 1e-24, usual near collapse, has a norm.
    Source: arXiv 2501.04697, eq. 12. Differs from the official code in the two cases just named, where that code
        rescales rounding noise to full length, or gives 0.
    """
    for w in parameters:
        g = w.grad
        if g is None or g.numel() == 0:
            continue
        if g.layout != torch.strided or g.is_complex():
            kind = "complex" if g.is_complex() else "sparse"
            raise UsageError(
                f"orthogonalize_gradients_: a {kind} gradient of shape {tuple(g.shape)}; expected dense real ones. "
                "Pass only the parameters that have such gradients."
            )
        g.copy_(_orthogonal(w, g, rescale))


def _orthogonal(w: Tensor, g: Tensor, rescale: bool) -> Tensor:
    dtype = torch.promote_types(w.dtype, torch.float32)
    w = w.to(dtype)
    largest = g.abs().max().to(dtype).clamp_min(torch.finfo(dtype).tiny)
    unit = g.to(dtype) / largest
    part = unit - (w * unit).sum() / ((w * w).sum() + _TINY) * w
    norm, left = torch.linalg.vector_norm(unit), torch.linalg.vector_norm(part)
    # below this the remainder is the rounding error of the subtraction, not a direction
    parallel = left <= 4 * torch.finfo(dtype).eps * norm
    scale = norm / (left + _TINY) if rescale else torch.ones_like(norm)
    return part * torch.where(parallel, 0, scale) * largest


class OrthogonalGradient:
    """Make an optimizer step along orthogonal gradients, whatever its kind.

        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
        OrthogonalGradient(optimizer)

    It acts in the optimizer's own step, on the gradients of all its parameter groups, also after `GradScaler` has
    unscaled them; gradients that a closure computes are made orthogonal after each evaluation.

    Args:
        optimizer: any `torch.optim.Optimizer`; its state and `state_dict` are as before.
        rescale: as in `orthogonalize_gradients_`.
    """

    def __init__(self, optimizer: Optimizer, *, rescale: bool = True) -> None:
        self.rescale = rescale

        def orthogonalize() -> None:
            for group in optimizer.param_groups:
                orthogonalize_gradients_(group["params"], rescale=self.rescale)

        self._hook = before_update(optimizer, orthogonalize)

    def remove(self) -> None:
        """Give the optimizer its own gradients back from the next step on."""
        self._hook.remove()
