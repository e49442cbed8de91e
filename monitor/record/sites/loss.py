"""The loss: the tensor that backward is called on, over the loss scale where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from monitor.record.mode import Watcher
from monitor.record.site import Site
from monitor.record.sites._backward import BACKWARD, losses

STATS = ("value", "micro_steps")


@dataclass
class _Call:
    """One call of backward: its loss, the attempt at an update it belongs to, and whether a closure made it."""

    value: Tensor | float
    epoch: int
    in_step: bool


class LossSite(Site):
    """Collects the losses of a step and records their sum: the number whose gradient the optimizer was given.

    With accumulation each loss has usually been divided by the number of micro-batches, and the sum is their mean.
    Calls inside the optimizer's own step are evaluations of a closure: the first is the loss at the parameters of the
    step.
    """

    name = "loss"

    def __init__(self, recorder: Any) -> None:
        super().__init__(recorder)
        self._calls: list[_Call] = []
        self._usual = (0, 0)  # calls and root forwards of the last step that was watched as a whole
        self._seen = False
        self._why = "no call of backward was seen"

    def before(self) -> dict[Any, Watcher]:
        """Watch both ways of calling backward."""
        return dict.fromkeys(BACKWARD, self._backward)

    def _backward(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        for loss in losses(args, kwargs):
            if loss.numel() != 1:
                self._why = "backward was called on a tensor with more than one element"
                continue
            value = loss.item() if self.rec.on_cpu else loss.detach().reshape(()).float()
            self._calls.append(_Call(value, self.rec.epoch, self.rec.in_step))

    def on_step(self, optimizer: Optimizer) -> None:
        """Record the loss of the update this optimizer has just made."""
        calls = [c for c in self._calls if c.epoch == self.rec.epoch]
        self._calls.clear()
        inside = [c for c in calls if c.in_step]
        if len(inside) > 1:  # a closure evaluated again and again along a search direction
            calls = inside[:1]
        if not self.rec.blind:
            self._usual = len(calls), self.rec.forwards
        elif len(calls) < self._usual[0] and self.rec.forwards >= self._usual[1]:
            return  # the others were made where nobody looked: a part of the sum would pass for the whole
        if not calls:
            return
        self._seen = True
        value = sum((c.value for c in calls[1:]), calls[0].value)
        scale = self.rec.inverse_scale
        if scale is not None:
            value = value * (scale.item() if self.rec.on_cpu else scale)
        count = float(len(calls))
        values = torch.stack((value, torch.full_like(value, count))) if isinstance(value, Tensor) else (value, count)
        self.rec.emit("loss", STATS, self.rec.label(optimizer), values)

    def missing(self) -> Sequence[tuple[str, str]]:
        """The loss, if backward was never seen."""
        return () if self._seen else (("loss", self._why),)
