"""The loss: the tensor that backward is called on, over the accumulation and the loss scale where these are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from monitor.record.mode import Watcher
from monitor.record.private import saved
from monitor.record.site import Site

STATS = ("value", "micro_steps")


@dataclass
class _Call:
    """One call of backward: its loss, the number it was divided by in its last operation (1 if none), when it came."""

    value: Tensor
    divisor: float
    epoch: int
    in_step: bool


class LossSite(Site):
    """Collects the losses of a step and records their mean.

    Several backward calls make a step when gradients are accumulated: if every loss had been divided by their
    number, it is multiplied back, so that the recorded value is the loss a reader expects. Calls inside the optimizer's
    own step are evaluations of a closure: the first is the loss at the parameters of this step.
    """

    name = "loss"

    def __init__(self, recorder: Any) -> None:
        super().__init__(recorder)
        self._calls: list[_Call] = []
        self._seen = False
        self._why = "no call of backward was seen"

    def before(self) -> dict[Any, Watcher]:
        """Watch both ways of calling backward."""
        return {torch.Tensor.backward: self._backward, torch.autograd.backward: self._backward}

    def _backward(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        self.rec.backward_begins()
        given = args[0] if args else kwargs.get("tensors")
        for loss in [given] if isinstance(given, Tensor) else list(given or ()):
            if loss.numel() != 1:
                self._why = "backward was called on a tensor with more than one element"
                continue
            value = loss.detach().reshape(()).clone()
            self._calls.append(_Call(value, _divisor(loss), self.rec.epoch, self.rec.in_step))

    def on_step(self, optimizer: Optimizer) -> None:
        """Record the loss of the update this optimizer has just made."""
        calls = [c for c in self._calls if c.epoch == self.rec.epoch]
        self._calls.clear()
        inside = [c for c in calls if c.in_step]
        if len(inside) > 1:  # a closure evaluated again and again along a search direction
            calls = inside[:1]
        if not calls:
            return
        self._seen = True
        n = len(calls)
        value = torch.stack([c.value.float() for c in calls]).mean()
        if n > 1 and all(c.divisor == n for c in calls):
            value = value * n
        scale = self.rec.inverse_scale
        if scale is not None:
            value = value * scale.to(value.device, non_blocking=True)
        values = torch.stack((value, torch.full_like(value, n)))
        self.rec.emit("loss", STATS, self.rec.label(optimizer), values)

    def missing(self) -> Sequence[tuple[str, str]]:
        """The loss, if backward was never seen."""
        return () if self._seen else (("loss", self._why),)


def _divisor(loss: Tensor) -> float:
    node = loss.grad_fn
    # (loss / accumulation) * scale: step over the GradScaler's multiplication
    if node is not None and type(node).__name__ == "MulBackward0":
        node = next((n for n, _ in node.next_functions if n is not None), None)
    if node is None or type(node).__name__ != "DivBackward0":
        return 1.0
    other = saved(node, "other")
    return float(other) if other is not None and other.numel() == 1 and other.device.type == "cpu" else 1.0
