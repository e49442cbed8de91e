"""Parameters, as they were before the update, their gradients and where they began: all that is compared, read once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from monitor.record.passes import alignment, distance, update
from monitor.record.passes.arrays import DOT, Array, Pieces, Row, rows, side_by_side
from monitor.record.passes.dtype import sum_dtype

Values = Tensor | Array

#: Sum of squares below which float32 may have lost elements, whose squares end at 1e-38.
_LEAST = 1e-25
_DOT, _GRADIENT, _BEFORE = range(3)


class ParameterReader:
    """Reads parameters of the same shapes again and again.

    On a CPU small tensors are copied side by side, so that one call serves many, and large ones are read in pieces that
    stay in cache.

    Args:
        before: copies of the parameters, floating tensors of one device and dtype, contiguous. They are the ones that
            later updates are compared with, with whatever is written to them until then.
        start: of each the `distance.sample` where it began.
    """

    SMALL, ROW = 1 << 13, 1 << 16

    def __init__(self, before: Sequence[Tensor], start: Sequence[Tensor]) -> None:
        self._before, self._start = before, start
        self._on_cpu = before[0].device.type == "cpu"
        sizes = [p.numel() for p in before]
        self._rows = rows(sizes, [i for i, size in enumerate(sizes) if 0 < size <= self.SMALL], self.ROW)
        large = [i for i, size in enumerate(sizes) if size > self.SMALL] if self._on_cpu else []
        self._dtype = sum_dtype(before[0])
        self._large = [(i, Pieces(before[i]), start[i].to(self._dtype).numpy()) for i in large]
        self._change = np.empty(DOT, np.float64 if self._dtype == torch.float64 else np.float32)

    def read(
        self, now: Sequence[Tensor], grads: Sequence[Tensor | None], distances: bool
    ) -> tuple[Values, Values | None, Values | None]:
        """What one update did to each parameter.

        Args:
            now: the parameters; read only.
            grads: what they were updated with, dense and floating, of the same shape; None where there is none.
            distances: also take the distance from where they began.

        Returns:
            ``(parameter, 2)`` `update.STATS`; ``(parameter with a gradient, 3)`` `alignment.STATS`, None if there is no
            such; ``(parameter, 3)`` `distance.STATS` or None. Arrays of float64 on a CPU, tensors elsewhere, where the
            copies are overwritten by the negative change. On a CPU inner products and norms of gradients are right down
            to elements of 1e-38, which are usual where a softmax has collapsed.

        Cost: one read of parameters, copies and gradients, for distances of a sixteenth more; no host sync.
        """
        if not self._on_cpu:
            return on_device(now, self._before, grads, self._start if distances else None)
        changed, aligned = np.zeros((len(now), 2)), np.zeros((len(now), 3))
        moved = np.tile((0.0, 0.0, 1.0), (len(now), 1)) if distances else None
        with np.errstate(all="ignore"):
            for row in self._rows:
                self._together(row, changed, aligned, moved, now, grads)
            for i, before, start in self._large:
                w, g = Pieces(now[i]), None if (given := grads[i]) is None else Pieces(given)
                changed[i], aligned[i] = self._alone(w, before, g, now[i].numel())
                if moved is not None:
                    moved[i] = distance.distance_stats(w.taken(distance.sample), start, now[i].numel())
            aligned[:, 1:] = np.sqrt(aligned[:, 1:])
            at = [i for i, g in enumerate(grads) if g is not None]
            return np.sqrt(changed), aligned[at] if at else None, moved

    def _together(
        self, row: Row, changed: Array, aligned: Array, moved: Array | None, now: Sequence[Tensor],
        grads: Sequence[Tensor | None],
    ) -> None:  # fmt: skip
        w, b = self._row(row, now), self._row(row, self._before)
        # what stands in for a gradient that is not there makes no difference to the others
        g = self._row(row, [b if g is None else g for b, g in zip(self._before, grads, strict=True)])
        products = [np.square(w - b), np.square(w), g * b, np.square(g), np.square(b)]
        if moved is not None:  # of small ones everything is kept, so that nothing is estimated
            products.append(np.square(w - self._row(row, self._start)))
        sums = np.stack([np.add.reduceat(p, row.begins) for p in products], axis=1)
        changed[row.at], aligned[row.at] = sums[:, :2], sums[:, 2:5]
        if moved is not None:
            moved[row.at, 0] = sums[:, 5]

    def _row(self, row: Row, tensors: Sequence[Tensor]) -> Array:
        """Copies of those of ``tensors`` that are in ``row``, as one vector of float64."""
        out = torch.empty(row.size, dtype=self._dtype, device="cpu")
        return side_by_side([tensors[i] for i in row.at], out).astype(np.float64)

    def _alone(
        self, now: Pieces, before: Pieces, grad: Pieces | None, size: int
    ) -> tuple[tuple[float, float], tuple[float, float, float]]:
        dd = ww = 0.0
        sums = [0.0, 0.0, 0.0]
        for begin in range(0, size, DOT):
            w, b = now(begin, begin + DOT), before(begin, begin + DOT)
            change = np.subtract(w, b, out=self._change[: w.size])
            dd += float(np.dot(change, change))
            ww += float(np.dot(w, w))
            if grad is not None:
                _add(sums, grad(begin, begin + DOT), b)
        if grad is not None and not (min(sums[1:]) >= _LEAST and max(sums[1:]) < math.inf):
            sums = [0.0, 0.0, 0.0]
            for begin in range(0, size, DOT):
                g, b = grad(begin, begin + DOT), before(begin, begin + DOT)
                _add(sums, g.astype(np.float64), b.astype(np.float64))
        return (dd, ww), (sums[_DOT], sums[_GRADIENT], sums[_BEFORE])


def _add(sums: list[float], g: Array, w: Array) -> None:
    """Add the inner products of a piece of a gradient and of its parameter."""
    sums[_DOT] += float(np.dot(g, w))
    sums[_GRADIENT] += float(np.dot(g, g))
    sums[_BEFORE] += float(np.dot(w, w))


def on_device(
    now: Sequence[Tensor], before: Sequence[Tensor], grads: Sequence[Tensor | None], start: Sequence[Tensor] | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`ParameterReader.read` as it is done on an accelerator."""
    given = [(g, held) for g, held in zip(grads, before, strict=True) if g is not None]
    aligned = alignment.alignment_stats(*zip(*given, strict=True)) if given else None  # before the copies change
    changed = update.update_stats(before, now)
    if start is None:
        return changed, aligned, None
    sampled = [distance.sample(w.detach().reshape(-1)) for w in now]
    return changed, aligned, distance.on_device(sampled, start, [w.numel() for w in now])
