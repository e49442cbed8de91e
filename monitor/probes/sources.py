"""Do the sources of the data agree about where the model should go? One gradient of each, on data of its own.

Source: Hemati et al. (2023), Understanding Hessian alignment for domain generalization, whose first term the alignment
of gradients is; `monitor.curvature.alignment` also compares the Hessians.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from monitor.curvature.closure import LossClosure, Selection
from monitor.curvature.precision import double
from monitor.errors import UsageError
from monitor.record.probe import Moment, Probe

STATS = ("cosine", "norm", "other_norm")


class Sources(Probe):
    """Measures ``gradient_alignment`` between sources of data, such as domains or tasks.

    Args:
        sources: name -> the loss on a fixed batch of it: a function without arguments that calls the model and returns
            the loss, or ``(loss_fn, batch)`` as for `monitor.curvature.LossClosure`. Two or more.
        parameters: names of parameters or modules; default all trainable ones.
        every: measure at each so many steps. Default: as often as 1 % of the run's time allows.

    Raises:
        UsageError: if there are fewer than two sources, or a name has a "|" in it.

    Example:
        losses = {name: (F.cross_entropy, batch) for name, batch in batches.items()}
        monitor.attach(model, probes=[Sources(losses, every=100)])
    """

    name = "gradient_alignment"

    def __init__(
        self,
        sources: Mapping[str, Callable[[], Tensor] | tuple[Callable[..., Any], Any]],
        parameters: Selection = None,
        every: int | None = None,
    ) -> None:
        if len(sources) < 2 or any("|" in name for name in sources):
            raise UsageError(f"sources are named {list(sources)}; expected two or more names without |")
        self.sources = dict(sources)
        self.parameters = parameters
        self.every = every
        self.cost = 2.0 * len(sources)

    def measure(self, moment: Moment) -> None:
        """A gradient of each source, in evaluation mode, and every pair's cosine."""
        gradients = {name: self._gradient(moment, given) for name, given in self.sources.items()}
        for a, b in combinations(gradients, 2):
            moment.emit("gradient_alignment", STATS, f"{a}|{b}", aligned(gradients[a], gradients[b]))

    def _gradient(self, moment: Moment, given: Any) -> Tensor:
        loss_fn, batch = given if isinstance(given, tuple) else (given, None)
        closure = LossClosure(moment.model, loss_fn, batch)
        return closure.gradient(closure.point(self.parameters))


def aligned(a: Tensor, b: Tensor) -> Tensor:
    """`STATS` of two flat gradients ``(n,)``: cosine (NaN if one is zero) and both norms, float64 ``(3,)``."""
    a, b = double(a), double(b)
    norms = torch.stack([a.norm(), b.norm()])
    return torch.stack([a @ b / norms.prod(), *norms])
