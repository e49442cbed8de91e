"""The gradient every parameter was updated with: unscaled, clipped, averaged, as the optimizer saw it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from monitor.record.passes import gradient_device
from monitor.record.passes.gradient import STATS, TURNS, WARMUP, GradientReader, History
from monitor.record.passes.gradient_device import SpikeReader, gradient_norms
from monitor.record.site import Site
from monitor.record.sites._updates import updates

#: Steps between two at which the extremes of all tensors are taken, so that the largest of all is known.
EVERY = 10


@dataclass
class _Part:
    """Gradients that are read together: of one device and dtype, in groups with one decay of the second moment.

    Attributes:
        at: their places in the optimizer's list of parameters.
        beta2: decay of the second moment; None if the gradients are not compared with it.
        plain: True if they are strided tensors, whose sizes stay.
        looks: at spikes, so far, on an accelerator.
        seconds: ids of the second moments when they were last found fit or unfit to compare with.
        fit: which of them are fit.
    """

    names: tuple[str, ...]
    params: list[Tensor]
    at: list[int]
    beta2: float | None
    plain: bool
    reader: GradientReader | SpikeReader
    seconds: list[int] = field(default_factory=list)
    fit: list[bool] = field(default_factory=list)
    looks: int = 0

    def renew(self, grads: Sequence[Tensor]) -> None:
        """Read gradients of other sizes, or with other second moments, from now on."""
        self.reader = _reader(grads, self.fit)


@dataclass
class _Plan:
    """How the gradients of an optimizer are read, and what that was decided on."""

    params: list[Tensor]
    kinds: list[object]
    decays: list[float | None]
    parts: list[_Part]

    def holds(self, params: list[Tensor], kinds: list[object], decays: list[float | None]) -> bool:
        """True if nothing has changed since."""
        return (
            len(params) == len(self.params)
            and all(map(is_, params, self.params))
            and kinds == self.kinds
            and decays == self.decays
        )


class GradientSite(Site):
    """Norms of all gradients and, for optimizers of Adam's kind, their spiked elements."""

    name = "gradient"
    dense = True

    def __init__(self, recorder: Any) -> None:
        super().__init__(recorder)
        self._plans: dict[int, _Plan] = {}
        self._any = self._spikes = False
        self._complex = False
        self._why_no_spikes = "no optimizer keeps a second moment of the gradient (exp_avg_sq)"

    def on_step(self, optimizer: Optimizer) -> None:
        """Record the gradients of this optimizer's parameters."""
        scale = getattr(optimizer, "grad_scale", None)  # set by GradScaler for optimizers that unscale inside
        params = [p for group in optimizer.param_groups for p in group["params"]]
        grads = [p.grad for p in params]
        # what must stay for a gradient to be read as before: device, dtype and size of a plain tensor, else its type
        kinds: list[object] = [
            (g.device, g.dtype, g.numel()) if type(g) is Tensor and g.layout is torch.strided else type(g)
            for g in grads
        ]
        decays = [None if scale is not None else _decay(group) for group in optimizer.param_groups]
        plan = self._plans.get(id(optimizer))
        if plan is None or not plan.holds(params, kinds, decays):
            plan = self._plans[id(optimizer)] = self._plan(optimizer, params, grads, kinds, decays)
        for part in plan.parts:
            given = [g for i in part.at if (g := grads[i]) is not None]
            if not part.plain:
                given = [_dense(g) for g in given]
                part.seconds, part.fit = [], []
                part.renew(given)
            if isinstance(part.reader, SpikeReader):
                self._on_device(optimizer, part, given, scale)
                continue
            history = self._history(optimizer, part, given)
            turn = self.rec.step // self.rec.every % TURNS
            values = part.reader.read(given, turn, history, self.due(EVERY) or scale is not None)
            if isinstance(scale, Tensor):
                values[:, :2] /= scale.item()
            self.rec.emit_many("gradient", STATS, part.names, values)

    def _on_device(self, optimizer: Optimizer, part: _Part, grads: list[Tensor], scale: Tensor | None) -> None:
        """Norms in every step; elements, which take more operations than that, in some."""
        close = self.due(gradient_device.EVERY, first=0)
        values = gradient_norms(grads, close)
        if isinstance(scale, Tensor):
            values.div_(scale.to(values.device, non_blocking=True))
        self.rec.emit_many("gradient", STATS, part.names, values, slice(0, values.shape[1]))
        # not counted: that would take five operations for each of them
        self.rec.emit_many("gradient", STATS, part.names, values[:, :1] * 0 != 0, slice(2, 3))
        if not close:
            return
        history = self._history(optimizer, part, grads)
        if history is not None and isinstance(part.reader, SpikeReader):  # which it may have made anew
            at, spikes = part.reader.read(grads, part.looks % TURNS, history)
            part.looks += 1
            if spikes is not None:
                self.rec.emit_many("gradient", STATS, [part.names[i] for i in at], spikes, slice(3, 5))

    def _plan(
        self, optimizer: Optimizer, params: list[Tensor], grads: list[Tensor | None], kinds: list[object],
        decays: list[float | None],
    ) -> _Plan:  # fmt: skip
        living = {id(o) for o in self.rec.optimizers}
        self._plans = {key: plan for key, plan in self._plans.items() if key in living}
        together: dict[tuple[object, ...], list[int]] = {}
        group_of = [i for i, group in enumerate(optimizer.param_groups) for _ in group["params"]]
        known: dict[int, float | None] = {}  # a group that joined later counts its own
        for i, (p, g, group) in enumerate(zip(params, grads, group_of, strict=True)):
            if g is None:
                continue
            g = _dense(g)
            self._complex = self._complex or g.is_complex()
            if g.is_floating_point() and g.numel() > 0:
                if group not in known:
                    known[group] = updates(self.rec, optimizer, optimizer.state.get(p, _NOTHING))
                plain = isinstance(kinds[i], tuple)
                together.setdefault((g.device, g.dtype, plain, decays[group], known[group]), []).append(i)
        parts = []
        for (_, _, plain, beta2, _), at in together.items():
            given = [_dense(g) for i in at if (g := grads[i]) is not None]
            names = tuple(self.rec.parameter(params[i]) for i in at)
            decay = beta2 if isinstance(beta2, float) else None
            parts.append(_Part(names, [params[i] for i in at], at, decay, bool(plain), _reader(given)))
        self._any = self._any or bool(parts)
        return _Plan(params, kinds, decays, parts)

    def _history(self, optimizer: Optimizer, part: _Part, grads: list[Tensor]) -> History | None:
        """What the gradients of ``part`` are compared with, if there is anything and it is worth it."""
        if part.beta2 is None:
            return None
        state = optimizer.state
        own = state.get(part.params[0], _NOTHING)
        n = updates(self.rec, optimizer, own)
        if n is None or n < 2:
            if "exp_avg_sq" in own:
                self._why_no_spikes = "too few updates so far" if n else "the optimizer does not count its updates"
            return None
        found = [state.get(p, _NOTHING).get("exp_avg_sq") for p in part.params]  # no [p]: it would add an empty state
        ids = list(map(id, found))
        if ids != part.seconds:
            part.seconds, part.fit = ids, [self._fits(g, v) for g, v in zip(grads, found, strict=True)]
            part.renew(grads)
        self._spikes = self._spikes or any(part.fit)
        if n <= WARMUP or not any(part.fit):
            return None
        if not (part.plain and all(part.fit)):
            found = [_dense(v) if fit else None for v, fit in zip(found, part.fit, strict=True)]
        return History(found, part.beta2, n)

    def _fits(self, g: Tensor, v: object) -> bool:
        if not isinstance(v, Tensor):
            return False
        v = _dense(v)
        if v.dtype not in _WIDE:
            self._why_no_spikes = "the optimizer keeps its second moment in 16 bits"
        elif v.shape != g.shape or v.dtype != g.dtype:  # a sparse gradient has some of the rows only
            self._why_no_spikes = "the optimizer's second moment has another shape or dtype than the gradient"
        else:
            return True
        return False

    def missing(self) -> Sequence[tuple[str, str]]:
        """Gradients if there were none, spikes if no optimizer keeps what they are compared with."""
        found = []
        if self._complex:
            found.append(("grad_norm", "complex gradients are not read"))
        elif not self._any:
            found.append(("grad_norm", "no parameter had a gradient at an optimizer step"))
        if self._any and not self._spikes:
            found.append(("spam_spike", self._why_no_spikes))
        return found


_WIDE = (torch.float32, torch.float64)
_NOTHING: dict[str, Any] = {}


def _reader(grads: Sequence[Tensor], fit: Sequence[bool] = ()) -> GradientReader | SpikeReader:
    """What reads gradients like these, of which ``fit`` can be compared with second moments."""
    fit = fit or [False] * len(grads)
    return GradientReader(grads, fit) if grads[0].is_cpu else SpikeReader([g.numel() for g in grads], fit)


def _decay(group: dict[str, Any]) -> float | None:
    """Decay of the second moment in a group that keeps one; None if there is none to compare with."""
    betas = group.get("betas")
    if not (isinstance(betas, tuple | list) and len(betas) == 2) or group.get("amsgrad"):
        return None
    return float(betas[1]) if 0 < float(betas[1]) < 1 else None


def _dense(t: Tensor) -> Tensor:
    """This rank's values of a gradient or state: the shard of a distributed tensor, the values of a sparse one."""
    if type(t) is Tensor and t.layout is torch.strided:
        return t
    local = getattr(t, "_local_tensor", None)
    if isinstance(local, Tensor):
        t = local
    if t.is_sparse:
        t = t.coalesce().values()
    return t.detach()
