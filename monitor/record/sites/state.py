"""What the optimizer was told: learning rate, clipping, loss scale; and the clock."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from monitor.record.mode import Watcher
from monitor.record.site import Site

_SCALE = ("scale", "skipped")
#: Updates skipped in a row at the end of a run that make a row of their own: nothing else would tell of them.
MANY = 20


class StateSite(Site):
    """Learning rates, the clipping coefficient and the loss scale of a step, and how long it took."""

    name = "state"

    def __init__(self, recorder: Any) -> None:
        super().__init__(recorder)
        self._clip: Tensor | None = None
        self._clip_epoch = 0
        self._clip_kind: tuple[torch.device, torch.dtype] | None = None
        self._unscaled = 0
        self._names: dict[tuple[str, int], tuple[str, ...]] = {}  # of the groups of an optimizer
        self._last = time.perf_counter()
        self._spent = 0.0

    @property
    def clip(self) -> Tensor | None:
        """The factor, ``()``, by which this attempt's gradients were shortened so far; None if they were not."""
        return self._clip if self._clip_epoch == self.rec.epoch else None

    def before(self) -> dict[Any, Watcher]:
        """Watch the multiplication by which gradients are clipped and GradScaler's unscaling."""
        return {
            torch._foreach_mul_: self._multiply,
            torch._amp_foreach_non_finite_check_and_unscale_: self._unscale,
        }

    def _multiply(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """``clip_grad_norm_`` multiplies all gradients by one 0-d coefficient; optimizers do so only inside a step.

        A step's closure may clip as well; evaluated again and again, it does for the first of them.
        """
        inside = self.rec.in_step and not (self.rec.in_closure and self.rec.evaluations == 1)
        if inside or len(args) < 2:
            return
        tensors, factor = args[0], args[1]
        if isinstance(factor, Tensor) and factor.dim() == 0 and tensors and self.rec.is_gradient(tensors[0]):
            placements = getattr(factor, "placements", ())
            if not all(x.is_replicate() for x in placements):  # to know it, every process would have to take part
                return
            value = getattr(factor, "_local_tensor", factor).detach().float()
            held, kind = self.clip, (tensors[0].device, tensors[0].dtype)
            if held is None:
                self._clip, self._clip_epoch, self._clip_kind = value, self.rec.epoch, kind
            elif kind == self._clip_kind:  # of each other device and dtype the same is multiplied in a call of its own
                self._clip = held * value

    def _unscale(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        grads, inverse = args[0], args[2]
        if not grads or not self.rec.is_gradient(grads[0]):
            return
        if self.rec.unscaled(inverse.detach().clone()):
            self._unscaled += 1

    def on_step(self, optimizer: Optimizer) -> None:
        """Record the learning rate of each parameter group."""
        rates: list[Any] = [g.get("lr") for g in optimizer.param_groups]
        if not all(isinstance(r, int | float | Tensor) for r in rates):
            return
        names = self._groups(self.rec.label(optimizer), len(rates))
        there = [i for i, r in enumerate(rates) if isinstance(r, Tensor) and not r.is_cpu]
        if not there:
            self.rec.emit_many("learning_rate", ("lr",), names, np.array(rates, dtype=np.float64).reshape(-1, 1))
            return
        values = torch.stack([rates[i].detach().float().reshape(1) for i in there])
        self.rec.emit_many("learning_rate", ("lr",), [names[i] for i in there], values)
        here = [i for i in range(len(rates)) if i not in there]
        if here:
            values = np.array([float(rates[i]) for i in here]).reshape(-1, 1)
            self.rec.emit_many("learning_rate", ("lr",), [names[i] for i in here], values)

    def _groups(self, label: str, number: int) -> tuple[str, ...]:
        """The same tuple at every step: its place in a row is remembered."""
        known = self._names.get((label, number))
        if known is None:
            names = (f"{label}.group[{i}]" if label else f"group[{i}]" for i in range(number))
            known = self._names[label, number] = tuple(names)
        return known

    def waiting(self) -> bool:
        """True if one update after the other was skipped since the last one that was made."""
        return self._unscaled - self.rec.stepped >= MANY

    def on_row(self) -> None:
        """Record what belongs to the step as a whole."""
        if self._clip is not None:
            self.rec.emit("clip", ("coefficient",), "", self._clip.view(1))
            self._clip = None
        if self._unscaled and self.rec.inverse_scale is not None:
            scale = self.rec.inverse_scale.float().reciprocal().view(1)
            skipped = max(0, self._unscaled - self.rec.stepped)
            self.rec.emit("loss_scale", _SCALE, "", scale, at=slice(0, 1))
            self.rec.emit("loss_scale", _SCALE, "", (float(skipped),), at=slice(1, 2))
        self._unscaled = 0
        if not self.rec.stepped:  # a row of what was logged after the last step
            return
        now = time.perf_counter()
        spent = self.rec.spent
        values = (now - self._last, spent - self._spent)
        self._last, self._spent = now, spent
        self.rec.emit("clock", ("step_seconds", "monitor_seconds"), "", values)
