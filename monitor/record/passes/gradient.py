"""Norm, extremes, non-finite values and element spikes of every gradient, in cache-sized pieces.

Source: SPAM (Huang et al., 2025): an element is spiked if g^2 > Theta v with v Adam's second moment before the step and
Theta = 5000. Seen after the step, with v' = b2 v + (1 - b2) g^2, that is g^2 (b2 + Theta (1 - b2)) > Theta v' (exact
algebra). We use the bias-corrected v, so Theta is divided by 1 - b2^(n-1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from monitor.block import ABSENT
from monitor.record.passes.arrays import Array, Row, dot, elements, rows, side_by_side
from monitor.record.passes.dtype import sum_dtype

STATS = ("norm", "max_abs", "nonfinite", "spikes", "spike_ratio")
_NORM, _PEAK, _BAD, _SPIKES, _RATIO = range(5)
THETA = 5000.0
#: Updates before the second moment says anything (SPAM's own warm-up).
WARMUP = 20
#: Second moment before the step, as a share of the one after it, below which float32 has lost it. It was 0 (the first
#: gradient an element ever had) or the spike is beyond 1e6 / (1 - beta2) times it: the mean over the rest of the tensor
#: decides which.
LOST = 1e-6
#: Elements of a gradient that is always looked at closely; larger ones are in one of so many turns.
SMALL, TURNS = 1 << 13, 4
#: Norms below this have lost bits in float32, whose squares end at 1e-38.
_LEAST = 1e-15


class History(NamedTuple):  # made at every step
    """What Adam remembers of the gradients.

    Attributes:
        seconds: second moment after the step (``exp_avg_sq``) of each gradient, of the same shape and dtype; None for
            those that have none.
        beta2: its decay.
        n: updates in it including this one; at least 2.
    """

    seconds: Sequence[Tensor | None]
    beta2: float
    n: float

    @property
    def correction(self) -> float:
        """What the second moment before the step is divided by."""
        return 1 - self.beta2 ** (self.n - 1)

    @property
    def slope(self) -> float:
        """An element is spiked if its second moment after the step is below ``slope`` g^2."""
        theta = THETA / self.correction
        return (self.beta2 + theta * (1 - self.beta2)) / theta


def taking_turns(large: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """For each turn those of ``large`` that are looked at closely, and the others."""
    return [
        (list(large[turn::TURNS]), [i for at, i in enumerate(large) if at % TURNS != turn]) for turn in range(TURNS)
    ]


class GradientReader:
    """Reads gradients on a CPU, of the same shapes step after step; on an accelerator `gradient_device` does.

    Of every tensor the norm is taken, and non-finite elements are counted where the norm is not finite. Largest
    elements and spikes need three times as much reading: they are looked for in tensors of up to `SMALL` elements,
    which are copied side by side so that one call serves many, and in the larger ones by turns.

    Args:
        grads: like those that will be read: dense floating tensors of one device and dtype, none of them empty.
        remembered: which of them the optimizer has a second moment of; default: none.
    """

    ROW, PIECE = 1 << 16, 1 << 15

    def __init__(self, grads: Sequence[Tensor], remembered: Sequence[bool] | None = None) -> None:
        self._wide = sum_dtype(grads[0])
        self._readable = grads[0].dtype == self._wide
        self._remembered = list(remembered or [False] * len(grads))
        self._zero: set[int] = set()
        sizes = [g.numel() for g in grads]
        # the last first: the optimizer has just been there, and what it read is in cache
        large = [i for i, size in enumerate(sizes) if size > SMALL][::-1]
        self._turns = taking_turns(large)
        #: Rows of small tensors, and whether the optimizer has second moments of them.
        self._rows: list[tuple[Row, bool]] = []
        for known in (True, False):
            some = [i for i, size in enumerate(sizes) if size <= SMALL and self._remembered[i] is known]
            self._rows += [(row, known) for row in rows(sizes, some, self.ROW)]
        room = max([self.PIECE if large else 0, *(row.size for row, _ in self._rows)])
        # the same memory at every step: what is new has to be fetched, page by page
        self._grads, self._seconds = torch.empty((2, room if self._rows else 0), dtype=self._wide, device="cpu")
        self._square = torch.empty(room, dtype=self._wide, device="cpu").numpy()
        self._below = np.empty(room, np.bool_)
        self._blank = np.full((len(grads), len(STATS)), ABSENT)
        self._blank[:, _BAD] = 0
        self._unspiked = self._blank.copy()
        for row, known in self._rows:
            if known:
                self._unspiked[row.at, _SPIKES:] = 0

    def read(
        self, grads: Sequence[Tensor], turn: int, history: History | None = None, extremes: bool = True
    ) -> npt.NDArray[np.float32]:
        """The statistics `STATS` of each tensor.

        Args:
            grads: of the sizes, device and dtype given before; read only.
            turn: which of the large tensors are looked at closely, from 0 to ``TURNS - 1``.
            history: what the optimizer remembers; without it no spikes are looked for.
            extremes: take the largest element of all large tensors.

        Returns:
            ``(tensor, 5)``; `monitor.block.ABSENT` where nothing was looked for. The norm is right down to elements of
            1e-38 (taken in float64 or rescaled where float32 squares underflow) and is infinite only if an element is,
            or the true norm exceeds 3.4e38. ``spike_ratio`` is the largest g^2 / v (bias-corrected v before the step)
            among the spiked elements, 0 if there is none; where v is lost to rounding (see `LOST`) the tensor's mean
            stands in for it.

        Cost: one read of every gradient; close up, one of the second moment and a few of what is in cache then; more
        only where something is spiked.
        Source: definition; underflow measured (the float32 norm of 1,000 x 1e-24 is 0); SPAM, module docstring.
        """
        close, far = self._turns[turn]
        out = (self._blank if history is None else self._unspiked).copy()
        with np.errstate(all="ignore"):
            if far and not extremes:
                norms = torch._foreach_norm([grads[i] for i in far], 2, dtype=self._wide)
                out[far, _NORM] = [norm.item() for norm in norms]
            for i in close:
                self._close_up(out[i], grads[i], None if history is None else history.seconds[i], history)
            for i in far if extremes else ():
                self._close_up(out[i], grads[i], None, None)
            for row, known in self._rows:
                self._together(out, row, grads, history if known else None)
            norm = out[:, _NORM]
            if not (norm.min() >= _LEAST and norm.max() < np.inf):
                self._rescue(out, grads, close)
        return out

    def _together(
        self, out: npt.NDArray[np.float32], row: Row, grads: Sequence[Tensor], history: History | None
    ) -> None:
        g = self._row(self._grads, row, [grads[i] for i in row.at])
        square = np.multiply(g, g, out=self._square[: row.size])
        # in binary the root of a square is exact
        extremes = np.sqrt((np.add.reduceat(square, row.begins), np.maximum.reduceat(square, row.begins)))
        if not extremes[1].min() > 0:  # or it is that of a square too small for float32
            extremes[1] = np.maximum.reduceat(np.abs(g), row.begins)
        out[row.at, :_BAD] = extremes.T
        if history is None:
            return
        v = self._row(self._seconds, row, [v for i in row.at if (v := history.seconds[i]) is not None])
        tripped = self._tripped(v, square, history)
        if tripped.size:
            begins = row.begins.tolist()
            cuts = np.searchsorted(tripped, row.begins).tolist()
            for i, begin, end, first, behind in zip(
                row.at, begins, [*begins[1:], row.size], cuts, [*cuts[1:], tripped.size], strict=True
            ):
                if behind > first:
                    out[i, _SPIKES:] = _spikes(g[begin:end], v[begin:end], tripped[first:behind] - begin, history)

    def _tripped(self, v: Array, square: Array, history: History) -> npt.NDArray[np.intp]:
        """Places of the elements that may be spiked; overwrites ``square``."""
        below = np.less(v, np.multiply(square, history.slope, out=square), out=self._below[: v.size])
        return below.nonzero()[0]

    def _close_up(
        self, row: npt.NDArray[np.float32], gradient: Tensor, second: Tensor | None, history: History | None
    ) -> None:
        g = self._array(gradient)
        v = None if second is None or history is None else elements(second)
        total, peak, tripped = 0.0, 0.0, []
        for begin in range(0, g.size, self.PIECE):  # pieces that stay in cache
            piece = g[begin : begin + self.PIECE]
            square = np.multiply(piece, piece, out=self._square[: piece.size])
            total += dot(piece, piece)
            peak = np.maximum(peak, np.maximum.reduce(square))
            if v is not None and history is not None:
                some = self._tripped(v[begin : begin + self.PIECE], square, history)
                if some.size:
                    tripped.append(some + begin)
        row[_NORM], row[_PEAK] = math.sqrt(total), math.sqrt(peak)
        if v is not None and history is not None:
            row[_SPIKES:] = _spikes(g, v, np.concatenate(tripped), history) if tripped else (0, 0)

    def _rescue(self, out: npt.NDArray[np.float32], grads: Sequence[Tensor], close: Sequence[int]) -> None:
        """Look again where the norm has left what float32 can square: at 0 and very small, very large or not finite.

        A large tensor that was found to be all 0, as that of an expert no token chooses, is looked at again in its turn
        or when its norm is no longer 0: elements below 1e-23 may pass for 0 until then.
        """
        norm = out[:, _NORM]
        for i in np.flatnonzero(~((norm >= _LEAST) & (norm < np.inf))).tolist():
            if norm[i] == 0 and grads[i].numel() <= SMALL and out[i, _PEAK] == 0:
                continue
            if norm[i] == 0 and i in self._zero and i not in close:
                continue
            g = self._array(grads[i])
            out[i, _PEAK] = peak = np.maximum(-g.min(), g.max())
            if peak == 0:
                self._zero.add(i)
            elif np.isfinite(peak):
                norm[i] = float(torch.linalg.vector_norm(grads[i], dtype=torch.float64))
            else:
                out[i, _BAD] = float((~torch.isfinite(grads[i])).sum())
        self._zero = {i for i in self._zero if norm[i] == 0}

    def _array(self, gradient: Tensor) -> Array:
        """Its elements for numpy: themselves, or a float32 copy of those of 16 bits."""
        return elements(gradient if self._readable else gradient.float())

    def _row(self, room: Tensor, row: Row, tensors: Sequence[Tensor]) -> Array:
        """Copies of all tensors as one vector."""
        return side_by_side(tensors, room[: row.size])


def _spikes(g: Array, v: Array, at: npt.NDArray[np.intp], history: History) -> tuple[float, float]:
    """Number and largest ratio of the spiked elements of a vector on a CPU; ``at`` are those to be looked at."""
    beta2 = history.beta2
    square, now = np.square(g[at], dtype=np.float64), v[at].astype(np.float64)
    before = (now - (1 - beta2) * square) / beta2
    lost = before <= LOST * now
    if lost.any():
        rest = np.delete(v, at)  # of a difference of two sums an enormous spike would leave nothing, or rounding
        mean = float(rest.sum()) / max(1, rest.size)
        before[lost] = mean if mean > 0 else math.inf  # there is nothing to compare with
    ratio = square * history.correction / before
    largest = float(ratio.max())
    return (float(np.count_nonzero(ratio > THETA)), largest) if largest > THETA else (0.0, 0.0)
