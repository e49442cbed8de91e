"""StableMax: a softmax whose numerator grows linearly, so that confident samples go on teaching.

With softmax the margin at which a sample's loss becomes exactly 0 is reached by scaling the logits up (24·ln 2 + ln K
nats in float32); with StableMax the wrong classes keep a share that shrinks only as 1/margin.

Source: Prieto, Barsbey, Mediano, Birdal (2025), "Grokking at the Edge of Numerical Stability", arXiv 2501.04697,
Def. 4.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def _log_s(x: Tensor) -> Tensor:
    """``ln s(x)`` with ``s(x) = x + 1`` for ``x >= 0`` and ``1 / (1 - x)`` below: odd, with slope 1 at 0."""
    # Each branch is clamped to its own side: the gradient of an unselected inf or NaN would poison the selected one.
    # sign(x)·log1p(|x|) is the same number, but its gradient at 0 is 0: a head initialised to zero would never learn.
    return torch.where(x < 0, -torch.log1p(-x.clamp(max=0)), torch.log1p(x.clamp(min=0)))


def stablemax(logits: Tensor, dim: int = -1) -> Tensor:
    """Class probabilities ``s(z_k) / Σ_j s(z_j)``.

    ``s(x) = x + 1`` for ``x >= 0`` and ``1 / (1 - x)`` for ``x < 0``. Equal to ``softmax(g(z))`` with
    ``g(x) = sign(x)·ln(1 + |x|)``, and computed that way. Unlike softmax it changes when a constant is added to ``z``.

    Args:
        logits: any shape, any real floating dtype; a logit of -inf has probability 0.
        dim: the axis of the classes.

    Returns:
        Probabilities of the shape, dtype and device of ``logits``.

    Source: arXiv 2501.04697, Def. 4. The official code adds 1e-30 to ``1 - x``; no guard is needed here.
    """
    return torch.softmax(_log_s(logits), dim)


def stablemax_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Cross-entropy ``-ln stablemax(z)_y`` in place of `torch.nn.functional.cross_entropy`.

    Args:
        logits: ``(class)``, ``(sample, class)`` or ``(sample, class, …)``, any real floating dtype.
        target: class indices (int64) or class probabilities, of the shapes that PyTorch's cross-entropy takes.
        ignore_index: samples with this class index count neither in the sum nor in the mean.
        reduction: "mean", "sum" or "none".
        dtype: of the arithmetic and of the result. float64 as in the official code; a device without it needs float32.

    Returns:
        The loss in nats, of type ``dtype``: 0-d, or one per sample for "none". The mean over no sample is NaN, as in
        PyTorch.

    Raises:
        RuntimeError, IndexError, ValueError: PyTorch's own, for shapes, classes or a reduction that it does not take.

    Cost: a copy of the logits in ``dtype`` and one elementwise pass, beside the usual cross-entropy.
    Source: arXiv 2501.04697, Def. 4 and its official code.
    """
    return nn.functional.cross_entropy(_log_s(logits.to(dtype)), target, ignore_index=ignore_index, reduction=reduction)


class StableMaxCrossEntropy(nn.Module):
    """`stablemax_cross_entropy` in place of `torch.nn.CrossEntropyLoss`.

    Args:
        ignore_index: samples with this class index count neither in the sum nor in the mean.
        reduction: "mean", "sum" or "none".
        dtype: of the arithmetic and of the result.
    """

    def __init__(
        self, *, ignore_index: int = -100, reduction: str = "mean", dtype: torch.dtype = torch.float64
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.dtype = dtype

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss in nats; shapes as for `stablemax_cross_entropy`."""
        return stablemax_cross_entropy(
            logits, target, ignore_index=self.ignore_index, reduction=self.reduction, dtype=self.dtype
        )
