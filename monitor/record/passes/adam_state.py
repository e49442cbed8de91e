"""The second moments that an optimizer of Adam's kind divides by."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

STATS = ("rms", "eps")


def moment_rms(moments: Sequence[Tensor], correction: float) -> Tensor | np.ndarray:
    """``sqrt(mean v / correction)`` of each tensor: the root mean square of the gradients that it remembers.

    Args:
        moments: ``v``, each of any shape, not negative, not empty, all of one device and dtype; read only.
        correction: ``1 − β2^n`` after n updates.

    Returns:
        ``(tensor,)``: float64 array on a CPU, float32 tensor elsewhere.

    Cost: one read of the tensors; no host sync on an accelerator.
    Source: Kingma and Ba (2015), Adam, Algorithm 1.
    """
    wide = torch.float64 if moments[0].dtype == torch.float64 else torch.float32
    sums = torch.stack(
        torch._foreach_norm(list(moments), 1, dtype=wide)
    )  # of what is not negative, the norm is the sum
    counts = [v.numel() for v in moments]
    if sums.device.type == "cpu":
        return np.sqrt(sums.double().numpy() / np.array(counts, dtype=np.float64) / correction)
    return (
        (sums / torch.tensor(counts, dtype=sums.dtype).to(sums.device, non_blocking=True) / correction).sqrt().float()
    )
