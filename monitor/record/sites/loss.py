"""The loss: the tensor that backward is called on, over the loss scale where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from monitor.record.held import Held, held
from monitor.record.mode import Watcher
from monitor.record.site import Site
from monitor.record.sites._backward import BACKWARD, losses

STATS = ("value", "micro_steps")


@dataclass
class _Call:
    """One call of backward: its loss, the attempt at an update it belongs to, and whether a closure made it.

    Attributes:
        evaluation: which evaluation of the closure in this step made it, from 1 on; 0 if that is not known.
        anew: True if the gradients of the call before had been removed when it began.
    """

    value: Tensor | float
    epoch: int
    in_step: bool
    evaluation: int
    anew: bool


class LossSite(Site):
    """Collects the losses of a step and records their sum: the number whose gradient the optimizer was given.

    With accumulation each loss has usually been divided by the number of micro-batches, and the sum is their mean.
    Calls inside the optimizer's own step are evaluations of a closure: the first is the loss at the parameters of the
    step. Where gradients were removed between two calls and the update is made with those of the last, the ones before
    served another purpose: to find where the loss is sharp, or a batch that is hard.
    """

    name = "loss"

    def __init__(self, recorder: Any) -> None:
        super().__init__(recorder)
        self._calls: list[_Call] = []
        self._usual = (0, 0)  # calls and root forwards of the last step that was watched as a whole
        self._given: Held | None = None  # a parameter that the last call has given a gradient,
        self._gradient = 0  # and the id of that
        self._seen = False
        self._why = "no call of backward was seen"

    def before(self) -> dict[Any, Watcher]:
        """Watch both ways of calling backward."""
        return dict.fromkeys(BACKWARD, self._backward)

    def after(self) -> dict[Any, Watcher]:
        """Watch their ends too."""
        return dict.fromkeys(BACKWARD, self._backward_ended)

    def _backward_ended(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        given = self._parameter()
        if given is None or given.grad is None:
            found = next(((p, place) for p, place in held(self.rec.roots) if p.grad is not None), None)
            if found is None:
                return
            given, self._given = found
        self._gradient = id(given.grad)

    def _parameter(self) -> Tensor | None:
        return None if self._given is None else self._given.parameter

    def _backward(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        anew = bool(self._calls) and (given := self._parameter()) is not None and given.grad is None
        for loss in losses(args, kwargs):
            if loss.numel() != 1:
                self._why = "backward was called on a tensor with more than one element"
                continue
            # of its own on an accelerator, where it is read later: the script may add to it, or divide it
            value = loss.item() if self.rec.on_cpu else loss.detach().reshape(()).to(torch.float32, copy=True)
            evaluation = self.rec.evaluations if self.rec.in_closure else 0
            self._calls.append(_Call(value, self.rec.epoch, self.rec.in_step, evaluation, anew))
            anew = False

    def on_step(self, optimizer: Optimizer) -> None:
        """Record the loss of the update this optimizer has just made."""
        calls = [c for c in self._calls if c.epoch == self.rec.epoch]
        self._calls.clear()
        inside = [c for c in calls if c.in_step]
        first = [c for c in inside[1:] if c.evaluation == inside[0].evaluation > 0]
        if len(inside) > 1 + len(first):  # a closure evaluated again and again along a search direction
            calls = [inside[0], *first]
        if not self.rec.blind:
            self._usual = len(calls), self.rec.forwards
        elif len(calls) < self._usual[0] and self.rec.forwards >= self._usual[1]:
            return  # the others were made where nobody looked: a part of the sum would pass for the whole
        if not calls:
            return
        last = max((i for i, c in enumerate(calls) if c.anew), default=0)
        if last and self._is_of_last(optimizer):
            calls = calls[last:]
        self._seen = True
        value = calls[0].value
        for c in calls[1:]:
            value = value + _beside(c.value, value)
        scale = self.rec.inverse_scale
        if scale is not None:
            value = value * (scale.item() if self.rec.on_cpu else _beside(scale, value))
        label = self.rec.label(optimizer)
        if isinstance(value, Tensor):
            self.rec.emit("loss", STATS, label, value.view(1), at=slice(0, 1))
            self.rec.emit("loss", STATS, label, (float(len(calls)),), at=slice(1, 2))
        else:
            self.rec.emit("loss", STATS, label, (value, float(len(calls))))

    def _is_of_last(self, optimizer: Optimizer) -> bool:
        """True if the last call has made the gradient of this update, which the user has not put together."""
        given = self._parameter()
        mine = any(p is given for group in optimizer.param_groups for p in group["params"])
        return given is not None and mine and id(given.grad) == self._gradient

    def missing(self) -> Sequence[tuple[str, str]]:
        """The loss, if backward was never seen."""
        return () if self._seen else (("loss", self._why),)


def _beside(x: Tensor | float, y: Tensor | float) -> Tensor | float:
    """``x`` where ``y`` is: losses of one step may lie on several accelerators."""
    return x.to(y.device, non_blocking=True) if isinstance(x, Tensor) and isinstance(y, Tensor) else x
