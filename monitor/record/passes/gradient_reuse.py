"""How much of a gradient had been used before: a sample of it, as it was left and as it is when it is used again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from monitor.record.passes.arrays import Array, Pieces

STATS = ("left", "norm", "backwards", "n")
#: Elements read of each tensor.
SIZE = 64
#: Cosine above which one gradient is another times a number: rounding to 16 bits takes 1e-6 from it.
_PARALLEL = 1 - 1e-5

#: ``(element,)`` of some gradients: an array on a CPU, float32 elsewhere.
Sample = Array | Tensor
#: What is true or not; on an accelerator a tensor ``()``, because asking would wait for it.
Truth = bool | Tensor


def sample(grads: Sequence[Tensor]) -> Sample:
    """A copy of up to `SIZE` evenly spaced elements of each gradient.

    Args:
        grads: contiguous floating tensors of one device. Read only.

    Returns:
        ``(element,)``: their own bits, widened where they have 16.

    Cost: `SIZE` elements of each; no host sync.
    """
    if grads[0].device.type == "cpu":
        return np.concatenate([Pieces(g).taken(_spaced).astype(np.float64) for g in grads])
    return torch.cat([_spaced(g.detach().reshape(-1)).float() for g in grads])


def _spaced(flat: Any) -> Any:
    """Up to `SIZE` evenly spaced elements of ``(element,)`` an array or a tensor."""
    return flat[:: max(1, flat.shape[0] // SIZE)][:SIZE]


def same(a: Sample, b: Sample) -> Truth:
    """True if two samples are equal element for element; never where there is a NaN."""
    if not alike(a, b):
        return False
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.eq(a, b).all()
    return bool(np.array_equal(a, b))


def alike(a: Sample, b: Sample) -> bool:
    """True if two samples can be compared: of as many elements, and on one device."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.device == b.device
    return type(a) is type(b) and a.shape == b.shape


def reuse(left: Sample, now: Sample, used: Sample, carried: Truth, backwards: int) -> Tensor | tuple[float, ...]:
    """The statistics `STATS` of one update.

    Args:
        left: ``(element,)`` of the gradient after the update before.
        now: of the gradient when the last backward ended.
        used: of the gradient this update was made with: ``now`` times a number, or it is not known what has been done
            to it since, and nothing counts as left over.
        carried: whether ``left`` is still in ``now``.
        backwards: calls of backward between the two updates.

    Returns:
        ``(4,)`` numbers on a CPU, else a float32 tensor: norm of what is left over, norm of the gradient before it was
        clipped and unscaled, ``backwards``, elements read.

    Cost: three inner products of a few hundred elements; no host sync.
    Source: definition.
    """
    if isinstance(left, Tensor) and isinstance(now, Tensor) and isinstance(used, Tensor):
        cosine = torch.nn.functional.cosine_similarity(_unit(now), _unit(used), dim=0)
        before, after = torch.linalg.vector_norm(left), torch.linalg.vector_norm(now)
        kept = torch.where((cosine > _PARALLEL) & carried, before, torch.zeros_like(before))
        return torch.stack((kept, after, torch.full_like(kept, backwards), torch.full_like(kept, len(left))))
    before, after = float(np.linalg.norm(left)), float(np.linalg.norm(now))
    parallel = float(np.dot(now, used)) > _PARALLEL * after * float(np.linalg.norm(used))
    return before if carried and parallel else 0.0, after, float(backwards), float(len(left))


def _unit(t: Tensor) -> Tensor:
    """``t`` over its largest element: a product of two small float32 would be 0."""
    return t / t.abs().amax()
