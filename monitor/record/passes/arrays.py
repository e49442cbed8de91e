"""Tensors on a CPU as numpy sees them: there a call costs a fifth of one of torch's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]

#: Elements of one inner product: of more than 10,000 BLAS makes work for several threads, which training needs itself.
DOT = 1 << 13
#: Up to this many tensors numpy joins quicker: of torch's code for it, which training rarely needs, none is in cache.
FEW = 24
_READABLE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Row:
    """Small tensors that are read side by side.

    Attributes:
        at: their places in the list they come from.
        begins: where each begins in the row.
        size: elements of the row.
    """

    at: npt.NDArray[np.intp]
    begins: npt.NDArray[np.intp]
    size: int


def rows(sizes: Sequence[int], at: Sequence[int], most: int) -> list[Row]:
    """The tensors ``at`` in rows of up to ``most`` elements, in order; ``sizes`` are those of all tensors."""
    groups: list[list[int]] = []
    room = 0
    for i in at:
        if not groups or sizes[i] > room:
            groups.append([])
            room = most
        groups[-1].append(i)
        room -= sizes[i]
    found = []
    for group in groups:
        ends = np.cumsum([sizes[i] for i in group])
        found.append(Row(np.array(group), np.concatenate(([0], ends[:-1])), int(ends[-1])))
    return found


def side_by_side(tensors: Sequence[Tensor], out: Tensor) -> Array:
    """Copy all of ``tensors`` into ``out``, ``(elements of all,)``, one after another; with gradients off.

    Returns:
        ``out`` for numpy.
    """
    array = out.numpy()
    if len(tensors) <= FEW and all(t.dtype == out.dtype for t in tensors):
        return np.concatenate([elements(t) for t in tensors], out=array)
    # most small tensors are vectors, and making a view costs as much as copying it
    torch.cat([t if t.dim() == 1 else t.reshape(-1) for t in tensors], out=out)
    return array


def elements(t: Tensor) -> Array:
    """``(element,)`` of a tensor of float32 or float64: themselves, if they lie one after another."""
    return t.numpy(force=True).reshape(-1)  # one call, and no copy of what is on a CPU


class Pieces:
    """The elements of a floating tensor, some at a time; those of 16 bits as float32."""

    def __init__(self, t: Tensor) -> None:
        self._readable = t.dtype in _READABLE
        self._all: Any = elements(t) if self._readable else t.detach().reshape(-1)

    def __call__(self, begin: int, end: int) -> Array:
        """``(end - begin,)`` elements."""
        part = self._all[begin:end]
        return part if self._readable else part.float().numpy()

    def taken(self, choose: Callable[[Any], Any]) -> Array:
        """What ``choose`` takes of ``(element,)`` an array or a tensor."""
        part = choose(self._all)
        return part if self._readable else part.float().numpy()


def dot(a: Array, b: Array) -> float:
    """Inner product of two vectors; parts of it in their own dtype, their sum in float64."""
    if a.size <= DOT:
        return float(np.dot(a, b))
    return sum(float(np.dot(a[i : i + DOT], b[i : i + DOT])) for i in range(0, a.size, DOT))
