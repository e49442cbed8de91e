"""Z-loss: a term that keeps ln Z, the normaliser of a softmax, near 0, so that logits cannot drift.

The cross-entropy does not change when a constant is added to all logits of a row, so nothing holds that constant in
place: late in training, without weight decay, output logits drift until a low precision no longer tells them apart. In
a router the same term keeps scores small.

Source: Chowdhery et al. (2022), PaLM, arXiv 2204.02311, section 5, for output logits; Zoph et al. (2022), ST-MoE, arXiv
2202.08906, eq. 5, for routers; Wortsman et al. (2023), arXiv 2309.14322, for the coefficient and for what it cures.
"""

from __future__ import annotations

import torch
from torch import Tensor


def z_loss(logits: Tensor, *, coefficient: float = 1e-4, valid: Tensor | None = None, dim: int = -1) -> Tensor:
    """``coefficient · mean((ln Σ_k exp z_k)²)``, to be added to the loss.

        loss = F.cross_entropy(logits, target) + z_loss(logits)

    Args:
        logits: any shape, any real floating dtype; a logit of -inf is a class left out.
        coefficient: 1e-4 for output logits (PaLM), 1e-3 for the scores of a router (ST-MoE), 1e-5 in OLMo 2.
        valid: bool, of the shape of ``logits`` without ``dim``: False for rows that do not count, such as padding.
        dim: the axis of the classes.

    Returns:
        0-d, in float32, or float64 for float64 logits. NaN if no row counts, as the mean over no row is in PyTorch.

    Cost: one read of the logits in each direction; 16-bit logits are copied to float32 first.
    Numerics: log-sum-exp with the maximum taken out, so logits of any size are fine.
    Source: arXiv 2204.02311 sec. 5. Not the "Z-loss" of de Brébisson and Vincent (2016), which is another thing.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    squares = logits.to(dtype).logsumexp(dim).square()
    if valid is None:
        return coefficient * squares.mean()
    return coefficient * torch.where(valid, squares, 0).sum() / valid.sum()
