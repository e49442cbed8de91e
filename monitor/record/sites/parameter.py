"""The parameters: their norm, what one step changed, and how far they have come from their start."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from monitor.record.passes import alignment, distance, rounding, update
from monitor.record.passes.parameter import ParameterReader
from monitor.record.site import Site

#: Steps between measurements.
EVERY = 10
#: Parameters of these lose updates in rounding, and are compared with what they were so many steps before.
NARROW, BACK = (torch.bfloat16, torch.float16), 100


@dataclass
class _Copy:
    """A parameter as it was after the update of ``step``, and the sample of where it began."""

    of: Tensor
    before: Tensor
    start: Tensor
    step: int

    def fits(self, p: Tensor) -> bool:
        """True if ``p`` can be compared with it: not moved, converted or resized since."""
        now, then = _local(p), self.before
        return (then.shape, then.dtype, then.device) == (now.shape, now.dtype, now.device)


@dataclass
class _Group:
    """Parameters handled together, the copies they are compared with and what compares them."""

    names: tuple[str, ...]
    params: list[Tensor]
    before: list[Tensor]
    copied: int  # step after whose update the copies were taken
    reader: ParameterReader
    earlier: list[Tensor] = field(default_factory=list)  # samples of parameters of 16 bits, some steps ago


class ParameterSite(Site):
    """Keeps one copy of the trainable parameters to know the true update and what the gradient was taken at.

    Of where they began it keeps a sixteenth, for the distance.
    """

    name = "parameter"

    def __init__(self, recorder: Any) -> None:
        super().__init__(recorder)
        self._copies: dict[int, _Copy] = {}
        self._groups: dict[int, tuple[object, list[_Group]]] = {}

    def on_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the first step there is nothing to compare with: take the copies."""
        if not self._copies:
            for p in module.parameters():
                if p.requires_grad:
                    self._copy(p, self.rec.step - 1)

    def _copy(self, p: Tensor, step: int) -> None:
        now = _local(p)
        before = now.detach().clone(memory_format=torch.contiguous_format)
        start, known = distance.sample(before.view(-1)), self._copies.get(id(p))
        if known is None or known.before.shape != before.shape:
            start = start.clone()
        else:  # moved or converted: it began where it began
            start = known.start.to(start, non_blocking=not start.is_cpu)
        self._copies[id(p)] = _Copy(p, before, start, step)

    def on_step(self, optimizer: Optimizer) -> None:
        """Record norm and change of this optimizer's parameters, and copy them if the next step is to be measured."""
        copy = self.due(EVERY, self.rec.step + 1)
        if not (copy or self.due(EVERY)):
            return
        for group in self._plan(optimizer):
            now = [_local(p) for p in group.params]
            if group.copied == self.rec.step - 1:
                self._compare(group, now)
            if copy:
                torch._foreach_copy_(group.before, now)
                group.copied = self.rec.step

    def _compare(self, group: _Group, now: list[Tensor]) -> None:
        """Record what the update did."""
        grads = [_gradient(p) for p in group.params]
        if now[0].dtype in NARROW and self.due(EVERY, first=0):
            self._round(group, now, grads)  # first: the reader may write to the copies
        changed, aligned, moved = group.reader.read(now, grads, self.due(EVERY, first=0))
        self.rec.emit_many("update", update.STATS, group.names, changed)
        if moved is not None:
            self.rec.emit_many("distance", distance.STATS, group.names, moved)
        if aligned is not None:
            given = [name for name, g in zip(group.names, grads, strict=True) if g is not None]
            self.rec.emit_many("alignment", alignment.STATS, given, aligned)

    def _round(self, group: _Group, now: list[Tensor], grads: list[Tensor | None]) -> None:
        """Record what the update, and all of the last hundred, could not change."""
        given = [i for i, g in enumerate(grads) if g is not None]
        samples = [distance.sample(w.detach().reshape(-1)) for w in now]
        back = self.due(BACK, first=0)
        if given:
            values = rounding.rounding_stats(
                [samples[i] for i in given],
                [distance.sample(group.before[i].view(-1)) for i in given],
                [distance.sample(g.reshape(-1)) for g in grads if g is not None],
                [now[i].numel() for i in given],
                [group.earlier[i] for i in given] if back and group.earlier else None,
            )
            names = [group.names[i] for i in given]
            self.rec.emit_many("rounding", rounding.STATS, names, values, slice(0, values.shape[1]))
        if back:
            group.earlier = [sample.clone() for sample in samples]

    def _plan(self, optimizer: Optimizer) -> list[_Group]:
        """Parameters in groups, made anew when the set of trained parameters changes."""
        trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        signature = [(id(p), p.device, p.dtype, p.shape) for p in trained]  # moved, converted and resized ones too
        held = self._groups.get(id(optimizer))
        if held is not None and held[0] == signature:
            return held[1]
        for group in held[1] if held is not None else ():
            for p in group.params:
                self._copies[id(p)].step = group.copied
        self._groups.pop(id(optimizer), None)
        self._forget({id(p) for p in trained})
        together: dict[tuple[object, ...], list[Tensor]] = {}
        for p in trained:
            if not p.is_floating_point():
                continue
            copy = self._copies.get(id(p))
            if copy is None or not copy.fits(p):
                # first seen after its update: there is nothing to compare with yet
                self._copy(p, self.rec.step)
                copy = self._copies[id(p)]
            together.setdefault((p.device, p.dtype, copy.step), []).append(p)
        groups = []
        for params in together.values():
            copies = [self._copies[id(p)] for p in params]
            names = tuple(self.rec.parameter(p) for p in params)
            before = [c.before for c in copies]
            reader = ParameterReader(before, [c.start for c in copies])
            groups.append(_Group(names, params, before, copies[0].step, reader))
        self._groups[id(optimizer)] = (signature, groups)
        return groups

    def _forget(self, trained: set[int]) -> None:
        """Let go of what neither the model nor an optimizer has any more."""
        living = {id(o) for o in self.rec.optimizers}
        self._groups = {key: held for key, held in self._groups.items() if key in living}
        kept = trained | {id(p) for root in self.rec.roots for p in root.parameters()}
        kept |= {id(p) for _, groups in self._groups.values() for group in groups for p in group.params}
        self._copies = {key: c for key, c in self._copies.items() if key in kept}


def _local(p: Tensor) -> Tensor:
    """This rank's values of a parameter; the parameter itself unless it is distributed."""
    if type(p) is nn.Parameter or type(p) is Tensor:
        return p
    local = getattr(p, "_local_tensor", None)
    return local if isinstance(local, Tensor) else p


def _gradient(p: Tensor) -> Tensor | None:
    """This rank's values of a parameter's dense gradient; None without one."""
    g = None if p.grad is None else _local(p.grad)
    return g if type(g) is Tensor and g.layout is torch.strided and g.numel() > 0 else None
