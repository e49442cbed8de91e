"""How active each unit behind an activation function is, and how often it lies at the end of that function's range."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from monitor.record.passes.dtype import sum_dtype

#: What `unit_stats` gives, and what the host knows.
STATS = ("dead", "dormant", "before", "still", "saturated", "units", "rows", "role")
OF_UNITS, KNOWN = slice(0, 5), slice(5, 8)

#: Rows (an example at one position) that are read of one call: at most so many, and so many numbers.
ROWS, NUMBERS = 4096, 1 << 22
#: A unit is dormant if its mean magnitude is at most so much of the mean unit's; the constant keeps 0 from 0 / 0. Sokar
#: et al. (2023), The Dormant Neuron Phenomenon (arXiv 2302.12902), definition 3.1 and the published code.
DORMANT, EPS = 0.025, 1e-9
#: A value is at an end of its range within so much of the range, and a unit saturated if it is in more than so many of
#: its rows.
NEAR, OFTEN = 0.01, 0.95


@dataclass(frozen=True)
class UnitSizes:
    """What is kept of one call of an activation function.

    Attributes:
        sizes: ``(unit,)`` mean magnitudes over the rows that were read.
        near: ``(unit,)`` share of these rows at an end of the range; None where that is unbounded.
        rows: how many were read.
    """

    sizes: Tensor
    near: Tensor | None
    rows: int

    @property
    def kind(self) -> Hashable:
        """Calls of one kind can be read together."""
        return self.sizes.device, self.sizes.dtype, self.sizes.shape, self.near is None


def unit_sizes(x: Tensor, axis: int, bounds: tuple[float, float] | None = None) -> UnitSizes:
    """What `unit_stats` is computed from.

    Args:
        x: result of an activation function, floating, at least two dimensions, not empty; read only.
        axis: its dimension of units; all others are rows.
        bounds: the ends of the function's range.

    Cost: two reads and one copy of at most `ROWS` rows and `NUMBERS` numbers, evenly spaced, three launches; with
    ``bounds`` twice that. No host sync.
    """
    some = _some(x.detach(), axis)
    others = [d for d in range(some.dim()) if d != axis]
    rows = some.numel() // some.shape[axis]
    sizes = some.abs().sum(others, dtype=sum_dtype(some)) / rows
    if bounds is None:
        return UnitSizes(sizes, None, rows)
    low, high = bounds
    near = (some - (low + high) / 2).abs_() >= (0.5 - NEAR) * (high - low)
    return UnitSizes(sizes, near.sum(others, dtype=sizes.dtype) / rows, rows)


def _some(x: Tensor, axis: int) -> Tensor:
    """A view of evenly spaced rows: of every example as many positions, as evenly in each of their dimensions."""
    left = max(1, min(ROWS, NUMBERS // x.shape[axis]))
    others = [d for d in range(x.dim()) if d != axis]
    for i, d in enumerate(others):
        size = x.shape[d]
        # the examples first; what is left of the rows is shared by the dimensions of the positions
        wanted = left if i == 0 else max(1, round(left ** (1 / (len(others) - i))))
        stride = -(-size // min(size, wanted))
        if stride > 1:
            x = x[(slice(None),) * d + (slice(stride // 2, None, stride),)]
        left = max(1, left // x.shape[d])
    return x


def unit_stats(kept: Sequence[UnitSizes], before: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """The statistics ``STATS[OF_UNITS]`` of several calls of one kind.

    Args:
        kept: of each call.
        before: of each call ``(unit,)`` bool, the units that were dormant at the look before; None at the first.

    Returns:
        ``(call, 5)``, all numbers of units: dead (mean magnitude 0), dormant (`DORMANT`), dormant at the look before,
        those of them that still are, saturated (0 where the range has no ends). NaN if any unit is not finite.
        ``(call, unit)`` bool: those that are dormant.

    Cost: some 20 launches for all of them; no host sync.
    Source: Sokar et al. (2023), definition 3.1.
    """
    sizes = torch.stack([k.sizes for k in kept])
    mean = sizes.mean(1, keepdim=True)
    score = sizes / (mean + EPS)
    dormant = score <= DORMANT
    none = torch.zeros_like(dormant[0])
    earlier = torch.stack([none if b is None else b for b in before])
    near = [k.near for k in kept if k.near is not None]
    saturated = torch.stack(near) > OFTEN if near else torch.zeros_like(dormant)
    counts = torch.stack((score <= 0, dormant, earlier, earlier & dormant, saturated), 1).sum(2, dtype=sizes.dtype)
    return torch.where(mean.isfinite(), counts, mean * torch.nan), dormant
