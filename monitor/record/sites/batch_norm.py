"""Batch normalisation in training: how many examples its statistics are taken over."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from monitor.record.mode import Watcher
from monitor.record.site import Site

#: Steps between two looks.
EVERY = 20
STATS = ("examples", "samples", "calls")
MERGE = ("min", "min", "sum")


class BatchNormSite(Site):
    """Shapes of what every `torch.nn.functional.batch_norm` that uses the statistics of its batch is given.

    No tensor is read. Normalisation over several processes is a function of its own and is not counted.
    """

    name = "batch_norm"
    inside_every = EVERY

    def __init__(self, recorder: Any) -> None:
        super().__init__(recorder)
        self._seen: list[tuple[int, int]] = []

    def after(self) -> dict[Any, Watcher]:
        """Watch the function that the modules of torch call."""
        return {F.batch_norm: self._called}

    def _called(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        x = args[0] if args else kwargs.get("input")
        of_batch = args[5] if len(args) > 5 else kwargs.get("training", False)
        if of_batch and self.rec.training and self.due(EVERY) and isinstance(x, Tensor) and x.dim() >= 2 and x.numel():
            self._seen.append((x.shape[0], x.numel() // x.shape[1]))

    def on_backward(self) -> None:
        """Keep what was seen since the last backward: this forward is being trained on."""
        if self._seen:
            examples, samples = map(min, zip(*self._seen, strict=True))
            values = (float(examples), float(samples), float(len(self._seen)))
            self.rec.emit("batch_norm", STATS, "", values, MERGE)
        self._seen.clear()

    def on_row(self) -> None:
        """Forget forwards that were never trained on."""
        self._seen.clear()
