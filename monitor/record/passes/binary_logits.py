"""The logits of a binary cross-entropy: their range, and whether they are probabilities already."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from monitor.record.passes.arrays import Pieces

STATS = ("n", "sum", "min", "max", "squashed")
MERGE = ("sum", "sum", "min", "max", "min")
#: Most logits read, and most that are copied where they do not lie one after another.
READ, COPIED = 1 << 12, 1 << 20

#: Operations that rearrange numbers or change their dtype, as autograd names them.
_MOVES = (
    "Alias", "Clone", "Expand", "Gather", "Index", "IndexSelect", "MaskedSelect", "Permute", "ReshapeAlias", "Select",
    "Slice", "Squeeze", "T", "ToCopy", "Transpose", "Unbind", "UnsafeView", "Unsqueeze", "View",
)  # fmt: skip


def binary_logits(z: Tensor, probabilities: bool) -> Tensor | list[float]:
    """The statistics `STATS` of some logits.

    Args:
        z: any shape, floating, not empty. Read only.
        probabilities: what `squashed` says of them.

    Returns:
        ``(5,)`` numbers on a CPU, a float32 tensor elsewhere: elements read, their sum, smallest and largest (NaN if
        one of them is), 1 if ``probabilities``. Up to `READ` evenly spaced elements are read, of the first rows of a
        tensor that is large and does not lie in one piece.

    Cost: one read of `READ` elements; no host sync on an accelerator.
    """
    z = z.detach()
    if not z.is_contiguous() and z.numel() > COPIED:
        z = z[: max(1, z.shape[0] * COPIED // z.numel())]
    flat = z.reshape(-1)
    if flat.device.type == "cpu":
        some = Pieces(flat).taken(_spaced)
        return [float(some.size), float(some.sum()), float(some.min()), float(some.max()), float(probabilities)]
    part = _spaced(flat).float()
    low, high = torch.aminmax(part)
    total = part.sum()
    size, known = (torch.full_like(total, float(x)) for x in (len(part), probabilities))
    return torch.stack((size, total, low, high, known))


def _spaced(flat: Any) -> Any:
    """Up to `READ` evenly spaced elements of ``(element,)`` an array or a tensor."""
    return flat[:: max(1, flat.shape[0] // READ)][:READ]


def squashed(node: Any) -> bool | None:
    """Whether the numbers that an autograd node gives are those of a sigmoid or a softmax, rearranged at most.

    Args:
        node: ``grad_fn`` of a tensor.

    Returns:
        None where autograd does not say: behind a compiled region or a function of the user's own.
    """
    while node is not None:
        name, kind, _ = type(node).__name__.partition("Backward")
        if not kind or not type(node).__name__[-1].isdigit():
            return None
        if name in ("Sigmoid", "Softmax"):
            return True
        if name not in _MOVES:
            return False
        node = node.next_functions[0][0]
    return False
