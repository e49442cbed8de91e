"""Gradients that are used again: those nobody has put back to zero, and those of an update without a backward."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from monitor.record.mode import Watcher
from monitor.record.passes.gradient_reuse import STATS, Sample, Truth, alike, reuse, same, sample
from monitor.record.site import START, Site
from monitor.record.sites._backward import BACKWARD

#: Updates between two looks. Odd, so that of two updates made for one backward now one and now the other is looked at.
EVERY = 31


@dataclass
class _Kept:
    """Gradients followed from one update of an optimizer to its next.

    Attributes:
        left: what they were after the update.
        now: what they were when the last backward ended.
        whole: True while every backward has found them as the event before had left them.
        added: True once a backward has changed them.
        backwards: calls of backward since the update.
        overtaken: True if another optimizer has made an update since the last backward: from there to the next forward
            nobody looks, and there may have been a backward of its own.
    """

    of: weakref.ref[Optimizer]
    params: list[Tensor]
    left: Sample
    now: Sample
    whole: Truth = True
    added: Truth = False
    backwards: int = 0
    overtaken: bool = False

    def read(self) -> Sample | None:
        """The gradients as they are; None if one of them is gone."""
        grads = [_readable(p) for p in self.params]
        found = [g for g in grads if g is not None]
        return sample(found) if len(found) == len(grads) else None

    def begins(self) -> None:
        """Backward is about to run."""
        self.backwards += 1
        self.overtaken = False
        if self.whole is not False:
            found = self.read()
            self.whole = False if found is None else self.whole & same(found, self.now)

    def ended(self) -> None:
        """Backward has run."""
        if self.whole is not False:
            found = self.read()
            if found is None:
                self.whole = False
            else:
                equal = same(found, self.now)
                self.added = self.added | (~equal if isinstance(equal, Tensor) else not equal)
                self.now = found


class ReuseSite(Site):
    """Follows a few gradients of every optimizer from one update to the next, every 31st time.

    They were carried over if every backward since the last update found them as the event before had left them, one has
    added to them, and the update was made with the sum. Where gradients are set to None, as torch does by default,
    nothing but that is looked at.
    """

    name = "reuse"

    def __init__(self, recorder: Any) -> None:
        super().__init__(recorder)
        self._kept: dict[int, _Kept] = {}

    def after(self) -> dict[Any, Watcher]:
        """Watch both ways of calling backward; their beginning is `on_backward`."""
        return dict.fromkeys(BACKWARD, self._backward_ended)

    def on_backward(self) -> None:
        """See whether the gradients that were left are still there."""
        for kept in self._kept.values():
            kept.begins()

    def _backward_ended(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        for kept in self._kept.values():
            kept.ended()

    def on_step(self, optimizer: Optimizer) -> None:
        """Record what was left over in this update, and keep what it leaves if the next one is looked at."""
        kept = self._kept.pop(id(optimizer), None)
        if kept is not None and kept.of() is optimizer:  # a dead one may have had its id
            self._record(optimizer, kept)
        for other in self._kept.values():
            other.overtaken = True
        done = self.rec.updates(optimizer)
        if done < START or done % EVERY == 0:
            self._kept = {key: k for key, k in self._kept.items() if k.of() is not None}
            params = _some([p for group in optimizer.param_groups for p in group["params"]])
            if params:
                left = sample([g for p in params if (g := _readable(p)) is not None])
                self._kept[id(optimizer)] = _Kept(weakref.ref(optimizer), params, left, left)

    def _record(self, optimizer: Optimizer, kept: _Kept) -> None:
        used = kept.read()
        if used is None or (kept.backwards and kept.overtaken and kept.whole is not False):
            return
        if kept.backwards:
            carried = kept.whole & kept.added
            now = used if kept.whole is False else kept.now
        else:
            carried, now = same(used, kept.left), used
        if alike(now, used) and alike(now, kept.left):  # else resized, or moved
            values = reuse(kept.left, now, used, carried, kept.backwards)
            self.rec.emit("gradient_reuse", STATS, self.rec.label(optimizer), values)


def _some(params: Sequence[Tensor]) -> list[Tensor]:
    """The first parameter with a gradient that can be read, the last, and one in the middle."""
    found: list[Tensor] = []
    for start, step in ((0, 1), (len(params) - 1, -1), (len(params) // 2, 1)):
        i = start
        while 0 <= i < len(params) and (any(p is params[i] for p in found) or not _fits(params[i], found)):
            i += step
        if 0 <= i < len(params):
            found.append(params[i])
    return found


def _fits(p: Tensor, others: Sequence[Tensor]) -> bool:
    g = _readable(p) if p.requires_grad else None
    return g is not None and all(g.device == other.device for other in others)


def _readable(p: Tensor) -> Tensor | None:
    """This rank's values of a parameter's gradient, if they lie one after another; None without them."""
    g = getattr(p.grad, "_local_tensor", p.grad)
    if not isinstance(g, Tensor) or g.layout is not torch.strided:
        return None
    return g if g.is_contiguous() and g.is_floating_point() and g.numel() else None
