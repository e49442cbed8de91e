"""Gradients on an accelerator: the statistics of `gradient`, with few operations and no host sync."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from monitor.record.passes.gradient import LOST, SMALL, THETA, History, taking_turns
from monitor.record.passes.side_by_side import SideBySide, norms

#: Steps between two looks at the elements. One costs some forty operations, as many as a layer of a transformer.
EVERY = 8


def gradient_norms(grads: Sequence[Tensor], extremes: bool) -> Tensor:
    """The first of the statistics `STATS` of each gradient, and the second if ``extremes`` are to be taken.

    Args:
        grads: dense floating tensors of one device and dtype, none of them empty; read only.
        extremes: take the largest elements too.

    Returns:
        ``(tensor, 1)`` or ``(tensor, 2)``. The norm is right down to elements of 1e-38 where the device has float64,
        else down to 1e-15.

    Cost: one read of every gradient, or two; two operations, or five; no host sync.
    Source: definition.
    """
    norm = norms(grads, 2)
    return torch.stack((norm, norms(grads, math.inf)), dim=1) if extremes else norm.unsqueeze(1)


class SpikeReader:
    """Counts spiked elements of gradients on an accelerator: of small ones whenever asked, of large ones by turns.

    Args:
        sizes: elements of each gradient, none of them 0.
        remembered: which of them the optimizer has a second moment of.
    """

    def __init__(self, sizes: Sequence[int], remembered: Sequence[bool]) -> None:
        known = [i for i, fit in enumerate(remembered) if fit]
        large = [i for i in known if sizes[i] > SMALL]
        small = [i for i in known if sizes[i] <= SMALL]
        turns = [sorted((*small, *some)) for some, _ in taking_turns(large)]
        self._turns = [(at, SideBySide([sizes[i] for i in at])) for at in turns]

    def read(self, grads: Sequence[Tensor], turn: int, history: History) -> tuple[Sequence[int], Tensor | None]:
        """The last two of the statistics `STATS` of the gradients whose ``turn`` it is.

        Args:
            grads: of the sizes given before, of one device and dtype; read only.
            turn: from 0 to ``TURNS - 1``.
            history: what the optimizer remembers.

        Returns:
            Which gradients were looked at, and ``(tensor, 2)`` of these; None if there are none.

        Cost: one read of gradients and second moments, and some thirty operations on copies of at most
            `side_by_side.MOST` elements; no host sync.
        Source: SPAM, as in `gradient`.
        """
        at, layout = self._turns[turn]
        if not at:
            return at, None
        seconds = [v for i in at if (v := history.seconds[i]) is not None]
        counts, peaks = [], []
        for sizes, g, v in layout.copies([grads[i] for i in at], seconds):
            ratio = torch.threshold_(_ratios(sizes, g, v, history), THETA, 0.0)
            peaks.append(norms(ratio.split(sizes), math.inf))
            counts.append(norms(ratio.sign_().split(sizes), 1))
        return at, torch.stack((layout.joined(counts), layout.joined(peaks, math.inf)), dim=1)


def _ratios(sizes: Sequence[int], g: Tensor, v: Tensor, history: History) -> Tensor:
    """``(element,)``: square over the second moment before the step; 0 where one is not finite. Overwrites ``g``."""
    square, beta2 = g.square_(), history.beta2
    tripped = v < square * history.slope
    before = torch.add(v, square, alpha=beta2 - 1).div_(beta2)
    lost = before <= v * LOST
    rest = norms(v.masked_fill(tripped, 0).split(sizes), 1)
    mean = rest / norms((~tripped).to(v.dtype).split(sizes), 1).clamp_min_(1)
    mean.masked_fill_(mean <= 0, math.inf)  # there is nothing to compare with
    repeats = torch.tensor(sizes).to(g.device, non_blocking=True)
    before = torch.where(lost, mean.to(v.dtype).repeat_interleave(repeats, output_size=len(v)), before)
    return square.mul_(history.correction).div_(before).nan_to_num_(0.0, math.inf)
