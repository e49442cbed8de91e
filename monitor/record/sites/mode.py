"""In which mode the modules are that compute something else in training than in evaluation, while they are trained."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from monitor.record.facts import unwrap
from monitor.record.site import Site
from monitor.record.sites._modes import Modes

#: Steps between two looks.
EVERY = 20
STATS = ("modules", "evaluating", "left")


class ModeSite(Site):
    """Counts dropout and batch normalisation in training forwards: all, in `eval()`, and in it after `train()`.

    No tensor is read. Of several forwards in a step the one counts in which the fewest are in evaluation: an attack, or
    a trial, may need it.
    """

    name = "mode"
    inside_every = EVERY

    def __init__(self, recorder: Any) -> None:
        super().__init__(recorder)
        self._modes = Modes()
        self._trained: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # modules that were in training mode at a look
        self._trainable: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()  # of a root, then
        self._seen: dict[int, tuple[int, int, int]] = {}  # evaluating, left and modules of each root in this step

    def on_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count the modules inside one root, which is about to be trained on."""
        if not self.due(EVERY):
            return
        module = unwrap(module)
        inside = self._modes.inside(module)
        if not inside:
            return
        evaluating = [m for m in inside if not m.training]
        left = 0
        if module.training:
            self._trained.add(module)
            self._trained.update(m for m in inside if m.training)
            self._trainable[module] = _trainable(module)
        elif module in self._trained and _trainable(module) >= self._trainable[module]:
            left = sum(m in self._trained for m in evaluating)
        seen = (len(evaluating), left, len(inside))
        self._seen[id(module)] = min(seen, self._seen.get(id(module), seen))

    def on_row(self) -> None:
        """Record what was trained in this step."""
        if self._seen and self.rec.stepped:
            evaluating, left, modules = map(sum, zip(*self._seen.values(), strict=True))
            self.rec.emit("mode", STATS, "", (float(modules), float(evaluating), float(left)))
        self._seen.clear()


def _trainable(module: nn.Module) -> int:
    """Parameters that are not frozen: a part that is, is put into evaluation on purpose."""
    return sum(p.requires_grad for p in module.parameters())
