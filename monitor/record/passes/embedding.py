"""Which rows of an embedding have ever had a gradient, as the optimizer's own memory tells."""

from __future__ import annotations

import torch
from torch import Tensor

STATS = ("rows", "never")

#: Columns that are looked at: a row with a gradient has one in practically every column.
COLUMNS = 4


def touched(moment: Tensor) -> Tensor:
    """Rows in whose moment anything is not 0.

    Args:
        moment: ``(row, feature)`` floating, a running mean of gradients or of their squares; read only.

    Returns:
        ``(row,)`` bool on the same device. NaN is not 0.

    Cost: `COLUMNS` strided columns of ``moment``; no host sync.
    Source: such a mean is exactly 0 until the first gradient of the row that is not.
    """
    stride = max(1, moment.shape[1] // COLUMNS)
    return (moment[:, ::stride][:, :COLUMNS] != 0).any(1)


def row_stats(seen: Tensor) -> Tensor | list[float]:
    """The statistics `STATS` of ``(row,)`` bool, True where a row has had a gradient: rows, rows that have not.

    Returns:
        2 numbers on a CPU, a float32 tensor elsewhere; no host sync there.
    """
    count = seen.shape[0]
    if seen.device.type == "cpu":
        return [float(count), float(count - int(seen.sum()))]
    left = count - seen.sum()
    return torch.stack((torch.full_like(left, count), left)).float()
