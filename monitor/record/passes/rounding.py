"""Elements that an update left as they were although their gradient is not 0: what 16 bits lose in rounding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from monitor.record.passes.side_by_side import SideBySide, norms

STATS = ("n", "asked", "lost", "elements", "still")


def rounding_stats(
    now: Sequence[Tensor],
    before: Sequence[Tensor],
    grads: Sequence[Tensor],
    elements: Sequence[int],
    earlier: Sequence[Tensor] | None = None,
) -> Tensor:
    """The statistics `STATS` of each parameter.

    Args:
        now: `distance.sample` of each parameter after the update; of one device and dtype; read only.
        before: the same elements before the update.
        grads: the same elements of what it was updated with, dense.
        elements: of each whole parameter.
        earlier: the same elements as they were many updates ago; without it the last statistic is not taken.

    Returns:
        ``(parameter, 5)`` or ``(parameter, 4)``, float64 where the device has it, else float32: elements looked at;
        those whose gradient is not 0; of these those that the update did not change; elements of the whole parameter;
        those with a gradient that have the value they had earlier. NaN is not 0, and no NaN is the same as another.

    Cost: one read of each sample, a sixteenth of the tensors; ten operations; no host sync.
    Source: definition.
    """
    sizes = [w.numel() for w in now]
    layout = SideBySide(sizes)
    asked, lost, still = [], [], []
    for cuts, w, b, g, *e in layout.copies(now, before, grads, *([] if earlier is None else [earlier])):
        g.ne_(0)
        asked.append(norms(g.split(cuts), 1))
        lost.append(norms(b.eq_(w).mul_(g).split(cuts), 1))
        still += [norms(then.eq_(w).mul_(g).split(cuts), 1) for then in e]
    first = layout.joined(asked)
    known = torch.tensor([sizes, list(elements)], dtype=first.dtype).to(first.device, non_blocking=True)
    columns = [known[0], first, layout.joined(lost), known[1]]
    return torch.stack([*columns, layout.joined(still)] if still else columns, dim=1)
