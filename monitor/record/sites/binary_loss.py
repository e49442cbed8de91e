"""The logits that a binary cross-entropy is called with."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from monitor.record.mode import Watcher
from monitor.record.passes.binary_logits import MERGE, STATS, binary_logits, squashed
from monitor.record.ring import Values
from monitor.record.site import Site

#: Steps between two looks.
EVERY = 20


class BinaryLossSite(Site):
    """Statistics of the logits of every `binary_cross_entropy_with_logits` that is trained on, every twentieth step."""

    name = "binary_loss"
    inside_every = EVERY

    def __init__(self, recorder: Any) -> None:
        super().__init__(recorder)
        self._pending: list[tuple[Values, tuple[int, ...]]] = []

    def after(self) -> dict[Any, Watcher]:
        """Watch the function; the module of torch calls it too."""
        return {F.binary_cross_entropy_with_logits: self._called}

    def _called(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        z = args[0] if args else kwargs.get("input")
        if not (isinstance(z, Tensor) and isinstance(result, Tensor) and result.requires_grad and z.numel()):
            return
        if self.rec.training and self.due(EVERY):
            known = squashed(z.grad_fn)
            self._pending.append((binary_logits(z, known is True), _UNKNOWN if known is None else ()))

    def on_backward(self) -> None:
        """Keep what was seen since the last backward: these losses are being trained on."""
        for i, (values, unknown) in enumerate(self._pending):
            name = "binary_cross_entropy" if i == 0 else f"binary_cross_entropy[{i}]"
            self.rec.emit("binary_logits", STATS, name, values, MERGE, absent=unknown)
        self._pending.clear()

    def on_row(self) -> None:
        """Forget calls whose result was never trained on."""
        self._pending.clear()


_UNKNOWN = (STATS.index("squashed"),)
