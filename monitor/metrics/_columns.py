"""What most formulas need: a statistic as it was recorded, and a sum divided by a count that may be 0.

Each answers with values and their own mask, so that what was absent, or a mean of nothing, is absent in the column
too and never 0.
"""

from __future__ import annotations

from monitor.metric import Array, Block, Mask


def recorded(block: Block, name: str) -> tuple[Array, Mask]:
    """The statistic ``name``, ``(step, module)``, wherever it was recorded."""
    return block[name], block.has(name)


def among(block: Block, name: str, count: str) -> tuple[Array, Mask]:
    """The statistic ``name``, ``(step, module)``, absent where ``count`` says that it was taken over nothing."""
    return block[name], block.has(name) & block.has(count) & (block[count] != 0)


def per(block: Block, total: str, *counts: str) -> tuple[Array, Mask]:
    """``total`` divided by the product of ``counts``, ``(step, module)``, absent where one of them is 0 or absent."""
    values, has = block[total], block.has(total)
    for count in counts:
        values = values / block[count]
        has = has & block.has(count) & (block[count] != 0)
    return values, has
