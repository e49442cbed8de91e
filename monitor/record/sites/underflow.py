"""Gradients that were computed in float16: what of them became 0."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from monitor.record.passes import distance, underflow
from monitor.record.site import Site

#: Steps between two looks.
EVERY = 10


class UnderflowSite(Site):
    """Looks at a sample of every gradient where float16 is in use, and at nothing elsewhere."""

    name = "underflow"

    def __init__(self, recorder: Any) -> None:
        super().__init__(recorder)
        self._half: bool | None = None

    def listens(self, step: int) -> bool:
        """True if it is time."""
        return self.due(EVERY, step, first=1)

    def on_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See whether the forward will be in float16."""
        if self._half is None:
            self._half = any(p.dtype == torch.float16 for p in module.parameters())
        kind = self.rec.device.type
        self._half |= torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16

    def on_step(self, optimizer: Optimizer) -> None:
        """Record this optimizer's gradients."""
        if not self._half and self.rec.inverse_scale is None:
            return
        together: dict[tuple[Any, ...], tuple[list[str], list[Tensor]]] = {}
        for group in optimizer.param_groups:
            for p in group["params"]:
                g = getattr(p.grad, "_local_tensor", p.grad)
                if isinstance(g, Tensor) and g.layout is torch.strided and g.is_floating_point() and g.numel():
                    names, grads = together.setdefault((g.device, g.dtype), ([], []))
                    names.append(self.rec.parameter(p))
                    grads.append(g.detach())
        scale = getattr(optimizer, "grad_scale", None)  # set by GradScaler for optimizers that unscale inside
        for names, grads in together.values():
            samples = [distance.sample(g.reshape(-1)) for g in grads]
            values = underflow.underflow_stats(samples, [g.numel() for g in grads])
            if isinstance(scale, Tensor):
                values[:, 2] /= scale
            self.rec.emit_many("underflow", underflow.STATS, names, values)
