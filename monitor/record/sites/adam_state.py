"""What Adam divides by: second moments beside the epsilon that keeps the division from failing."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from monitor.record.passes.adam_state import STATS, moment_rms
from monitor.record.site import Site
from monitor.record.sites._updates import updates

#: Steps between two looks, and one look more.
EVERY, EARLY = 100, 10


class AdamStateSite(Site):
    """Root mean squares of the second moments of every parameter, every hundredth step and at the tenth."""

    name = "adam_state"

    def listens(self, step: int) -> bool:
        """True if it is time."""
        return step % EVERY == 0 or step == EARLY

    def on_step(self, optimizer: Optimizer) -> None:
        """Record the moments of this optimizer's parameters, if it is of Adam's kind."""
        for group in optimizer.param_groups:
            eps, betas = group.get("eps"), group.get("betas")
            if not isinstance(eps, int | float) or not (isinstance(betas, tuple | list) and len(betas) == 2):
                continue
            together: dict[tuple[Any, ...], tuple[list[str], list[Tensor]]] = {}
            for p in group["params"]:
                state = optimizer.state.get(p, {})  # no [p]: it would add an empty state
                v, n = state.get("exp_avg_sq"), updates(self.rec, optimizer, state)
                v = getattr(v, "_local_tensor", v)
                if isinstance(v, Tensor) and v.is_floating_point() and v.numel() and v.layout is torch.strided and n:
                    names, moments = together.setdefault((v.device, v.dtype, n), ([], []))
                    names.append(self.rec.parameter(p))
                    moments.append(v)
            for (_, _, n), (names, moments) in together.items():
                correction = 1 - float(betas[1]) ** n
                if correction <= 0:
                    continue
                rms = moment_rms(moments, correction)
                if isinstance(rms, np.ndarray):
                    values: Any = np.stack((rms, np.full_like(rms, eps)), axis=1)
                else:
                    values = torch.stack((rms, torch.full_like(rms, eps)), dim=1).to(self.rec.device)
                self.rec.emit_many("adam_state", STATS, names, values)
