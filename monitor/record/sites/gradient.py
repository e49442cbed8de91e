"""The gradient every parameter was updated with: unscaled, clipped, averaged, as the optimizer saw it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from monitor.record.passes.gradient import STATS, WARMUP, Scratch, gradient_stats, spike_stats
from monitor.record.site import Site

_NORMS, _SPIKES = slice(0, 3), slice(3, 5)
#: Tensors of more elements are searched for spiked ones in turn, each at every fourth step: it needs the second moment
#: too, half again of what the norms read. A spiked batch shows in every tensor at once.
_SMALL, _TURNS = 1 << 14, 4


class GradientSite(Site):
    """Norms of all gradients and, for optimizers of Adam's kind, their spiked elements."""

    name = "gradient"

    def __init__(self, recorder: Any) -> None:
        super().__init__(recorder)
        self._scratch = Scratch()
        self._any = self._spikes = False
        self._complex = False
        self._why_no_spikes = "no optimizer keeps a second moment of the gradient (exp_avg_sq)"

    def on_step(self, optimizer: Optimizer) -> None:
        """Record the gradients of this optimizer's parameters."""
        scale = getattr(optimizer, "grad_scale", None)  # set by GradScaler for optimizers that unscale inside
        for group in optimizer.param_groups:
            names, params, grads = [], [], []
            for p in group["params"]:
                g = p.grad
                if g is None:
                    continue
                g = _dense(g)
                self._complex = self._complex or g.is_complex()
                if not g.is_floating_point() or g.numel() == 0:
                    continue
                names.append(self.rec.parameter(p))
                params.append(p)
                grads.append(g)
            if not grads:
                continue
            self._any = True
            values = gradient_stats(grads)
            if isinstance(scale, Tensor):
                divisor = torch.stack((scale, scale, torch.ones_like(scale)))
                values = values / (divisor.numpy() if self.rec.on_cpu else divisor)
            self.rec.emit_many("gradient", STATS, names, values, _NORMS)
            self._spiked(optimizer, group, names, params, grads, scale)

    def _spiked(
        self, optimizer: Optimizer, group: dict[str, Any], names: list[str], params: list[Tensor], grads: list[Tensor],
        scale: object,
    ) -> None:  # fmt: skip
        betas = group.get("betas")
        if not (isinstance(betas, tuple | list) and len(betas) == 2) or group.get("amsgrad") or scale is not None:
            return
        beta2 = float(betas[1])
        n = self._updates(optimizer, params[0])
        if n is None or n < 2 or not 0 < beta2 < 1:
            return
        some_names, some_grads, seconds = [], [], []
        for name, p, g in zip(names, params, grads, strict=True):
            v = optimizer.state.get(p, {}).get("exp_avg_sq")  # no [p]: it would add an empty state
            if not isinstance(v, Tensor):
                continue
            v = _dense(v)
            if v.dtype not in _WIDE:
                self._why_no_spikes = "the optimizer keeps its second moment in 16 bits"
            elif v.shape != g.shape or v.dtype != g.dtype:  # a sparse gradient has some of the rows only
                self._why_no_spikes = "the optimizer's second moment has another shape or dtype than the gradient"
            else:
                some_names.append(name)
                some_grads.append(g)
                seconds.append(v)
        if not some_names:
            return
        self._spikes = True
        if n > WARMUP:
            turn = [i for i, g in enumerate(some_grads) if g.numel() <= _SMALL or (i + self.rec.step) % _TURNS == 0]
            if turn:
                some_grads, seconds = [some_grads[i] for i in turn], [seconds[i] for i in turn]
                values = spike_stats(some_grads, seconds, beta2, n, self._scratch)
                self.rec.emit_many("gradient", STATS, [some_names[i] for i in turn], values, _SPIKES)

    def _updates(self, optimizer: Optimizer, p: Tensor) -> float | None:
        """Updates in the second moment, from the optimizer's own counter where reading it costs no sync."""
        step = optimizer.state[p].get("step") if p in optimizer.state else None
        if isinstance(step, Tensor):
            return float(step) if step.device.type == "cpu" else float(self.rec.updates(optimizer))
        return float(step) if isinstance(step, int | float) else None

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
