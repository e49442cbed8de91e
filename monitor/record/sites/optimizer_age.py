"""How long the optimizers have been there: one that is made anew has forgotten everything."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from monitor.record.site import Site

#: Steps between two records, each of all steps since the one before: an optimizer may be made anew for as many updates.
EVERY = 11
STATS = ("updates", "remembers")


class OptimizerAgeSite(Site):
    """The most updates that one of the optimizers since the last record has made so far, and whether it keeps any."""

    name = "optimizer_age"

    def __init__(self, recorder: Any) -> None:
        super().__init__(recorder)
        self._oldest = (0, 0.0)

    def on_step(self, optimizer: Optimizer) -> None:
        """Keep the oldest."""
        updates = self.rec.updates(optimizer)
        if updates > self._oldest[0]:
            # what it keeps it has made at its first update; looked at once, and last when it is recorded
            looks = not self._oldest[0] or self.due(EVERY)
            self._oldest = (updates, float(_remembers(optimizer)) if looks else self._oldest[1])

    def on_row(self) -> None:
        """Record it."""
        if self._oldest[0] and self.due(EVERY):
            self.rec.emit("optimizer_age", STATS, "", self._oldest)
            self._oldest = (0, 0.0)


def _remembers(optimizer: Optimizer) -> bool:
    """True if it keeps something for each element of the first parameter it keeps anything of: a momentum."""
    p, state = next(iter(optimizer.state.items()), (None, {}))
    return isinstance(p, Tensor) and any(
        isinstance(v, Tensor) and v.shape == p.shape and v.is_floating_point() and v.dim() > 0 for v in state.values()
    )
