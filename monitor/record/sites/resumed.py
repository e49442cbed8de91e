"""What the optimizers remember when a run goes on."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from monitor.record.site import START, Site

STATS = ("counted", "since")


class ResumedSite(Site):
    """The optimizers' own counts of updates in the first steps of an attempt that does not begin at step 0."""

    name = "resumed"

    def __init__(self, recorder: Any) -> None:
        super().__init__(recorder)
        self._first = recorder.step

    def listens(self, step: int) -> bool:
        """True in the first steps of a resumed run."""
        return 0 < self._first <= step < self._first + START

    def on_step(self, optimizer: Optimizer) -> None:
        """Record the largest count: parameters that were added later have made fewer updates."""
        counts = [n for state in optimizer.state.values() if (n := state.get("step")) is not None]
        here = [float(n) for n in counts if not isinstance(n, Tensor) or n.is_cpu]
        there = [n for n in counts if isinstance(n, Tensor) and not n.is_cpu]
        label = self.rec.label(optimizer)
        if here:
            self.rec.emit("optimizer_resumed", STATS, label, (max(here),), at=slice(0, 1))
        elif there:
            self.rec.emit("optimizer_resumed", STATS, label, there[0].detach().float().view(1), at=slice(0, 1))
        if counts:
            self.rec.emit("optimizer_resumed", STATS, label, (float(self.rec.updates(optimizer)),), at=slice(1, 2))
