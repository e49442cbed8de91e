"""Autocast that is never left: its copies of the parameters are made once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from monitor.record.site import Site

#: Steps between two looks.
EVERY = 10
STATS = ("stale",)


class AutocastSite(Site):
    """Whether what autocast has converted before an update is used after it.

    A number of our own is converted after an update, changed, and converted again in the next forward: on the host,
    which shares what is kept with all devices.
    """

    name = "autocast"

    def __init__(self, recorder: Any) -> None:
        super().__init__(recorder)
        self._number: Tensor | None = None

    def listens(self, step: int) -> bool:
        """True if it is time, or was in the step before."""
        return self.due(EVERY, step) or self.due(EVERY, step - 1)

    def on_step(self, optimizer: Optimizer) -> None:
        """Have a number converted, if some autocast has not been left before the update."""
        if self.due(EVERY) and _inside():
            self._number = torch.ones((1, 1), device="cpu").requires_grad_()  # only of what is trained a copy is kept
            _converted(self._number)
            self._number.detach().fill_(2)

    def on_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See whether it has its new value, if the forward is one of those that convert."""
        number, self._number = self._number, None
        on = torch.is_autocast_enabled(self.rec.device.type) and torch.is_autocast_cache_enabled()
        if number is not None and on:
            self.rec.emit("autocast", STATS, "", (float(_converted(number) != 4),))


def _inside() -> bool:
    """True inside any autocast, also one that is not enabled: what is kept lasts until the outermost is left."""
    depth = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return depth > 1


def _converted(number: Tensor) -> float:
    """The square of what autocast takes ``number`` for, ``(1, 1)`` on the host."""
    with torch.autocast("cpu", torch.bfloat16):
        return torch.mm(number, number).item()
