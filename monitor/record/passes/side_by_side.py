"""Many tensors on an accelerator as one: there every operation is paid for, whatever it does.

Tensors are copied one after another into a buffer of limited size, by one operation, so that what is computed of every
element costs the same number of operations for one tensor and for a thousand. Sums and extremes of each are taken by
the norms that torch takes of whole lists: of numbers that are not negative the norm of order 1 is the sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from monitor.curvature.precision import widest
from monitor.record.passes.dtype import sum_dtype

#: Elements of a buffer, 64 MB of float32; a multiple of `distance.BLOCK`.
MOST = 1 << 24


class Piece(NamedTuple):
    """Elements ``begin`` to ``end`` of the tensor at place ``of``."""

    of: int
    begin: int
    end: int


class SideBySide:
    """Tensors of given sizes, cut into pieces where they are larger than a buffer and put together where smaller.

    Args:
        sizes: elements of each tensor.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self._counts = [math.ceil(max(size, 1) / MOST) for size in sizes]  # pieces of each tensor
        self._buffers: list[list[Piece]] = []
        room = -1
        for i, size in enumerate(sizes):
            for begin in range(0, max(size, 1), MOST):
                piece = Piece(i, begin, min(begin + MOST, size))
                if piece.end - begin > room:
                    self._buffers.append([])
                    room = MOST
                self._buffers[-1].append(piece)
                room -= piece.end - begin

    def copies(self, *lists: Sequence[Tensor]) -> Iterator[tuple[list[int], *tuple[Tensor, ...]]]:
        """Buffer after buffer, filled from each of ``lists``.

        Args:
            lists: tensors of the sizes, of one device each; strided. Read only.

        Yields:
            The sizes of the pieces in it, and for each of ``lists`` a buffer ``(element,)`` of float32, or float64
            if it is of that. It may be written to; the next overwrites it.
        """
        longest = max(sum(p.end - p.begin for p in pieces) for pieces in self._buffers)
        room = [torch.empty(longest, dtype=sum_dtype(ts[0]), device=ts[0].device) for ts in lists]
        for pieces in self._buffers:
            sizes = [p.end - p.begin for p in pieces]
            filled = [r[: sum(sizes)] for r in room]
            for buffer, tensors in zip(filled, lists, strict=True):
                parts = [self._part(tensors[p.of], p) for p in pieces]
                torch._foreach_copy_([b.view_as(t) for b, t in zip(buffer.split(sizes), parts, strict=True)], parts)
            yield sizes, *filled

    def _part(self, t: Tensor, piece: Piece) -> Tensor:
        t = t.detach()
        return t if self._counts[piece.of] == 1 else t.reshape(-1)[piece.begin : piece.end]

    def joined(self, of_pieces: Sequence[Tensor], order: float = 1) -> Tensor:
        """``(tensor,)`` sums of what is not negative, ``(piece,)`` for each buffer; with `math.inf` the largest."""
        values = of_pieces[0] if len(of_pieces) == 1 else torch.cat(list(of_pieces))
        return values if max(self._counts) == 1 else norms(values.split(self._counts), order)


def norms(tensors: Sequence[Tensor], order: float) -> Tensor:
    """``(tensor,)``: the norm of each, in the widest dtype of their device."""
    return torch.stack(torch._foreach_norm(list(tensors), order, dtype=widest(tensors[0].device)))
