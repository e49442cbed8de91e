"""How many examples can be fitted independently of one another: the singular values of their gradients.

Row i of J is the gradient of the loss of example i, and J J' says how the examples pull on each other: one large
singular value, and all of them want the same; a long even spectrum, and each can be lowered by itself; one over many
orders of magnitude, and some are fitted long before others.

Source: Sven: Singular value descent, the spectrum of the loss Jacobian; Roy and Vetterli (2007), The effective rank,
and Schaeffer et al. (2023), Double descent demystified, for the condition number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from monitor.curvature.closure import Batch, LossClosure, Selection
from monitor.curvature.jacobian import SingularValues, gradients, jacobian_rows, singular_values
from monitor.errors import UsageError
from monitor.probes import _cross_entropy
from monitor.record.probe import Moment, Probe, Sparsely

STATS = ("rows", "rank", "effective_rank", "condition", "largest", "smallest")
#: Bytes that the gradients may take, and the fewest of them that say something.
MEMORY, FEWEST = 2e9, 8


class JacobianSpectrum(Probe):
    """Measures ``jacobian_spectrum``: the gradients of single examples, in evaluation mode.

    Args:
        loss: ``(loss_fn, batch)`` as for `monitor.curvature.LossClosure`, all of whose examples count; the loss a plain
            mean over them. Default: the first batch of the run, and of it rows of its cross-entropies.
        parameters: names of parameters or modules; default all trainable ones.
        rows: how many rows of the first batch, evenly spaced; fewer if their gradients would take more than 2 GB.
        every: measure at each so many steps. Default: as often as 1 % of the run's time allows.

    Raises:
        UsageError: if ``rows`` is below 8.

    Example:
        monitor.attach(model, probes=[JacobianSpectrum(every=1000)])
    """

    name = "jacobian_spectrum"

    def __init__(
        self,
        loss: tuple[Callable[..., Any], Any] | None = None,
        parameters: Selection = None,
        rows: int = 32,
        every: int | None = None,
    ) -> None:
        if rows < FEWEST:
            raise UsageError(f"rows={rows!r}; expected at least {FEWEST}")
        self.loss = loss
        self.parameters = parameters
        self.rows = rows
        self.every = every
        self.keeps_first = loss is None
        self.cost = float(rows)
        self.begin()

    def begin(self) -> None:
        """Forget the run before."""
        self._sparsely = Sparsely()

    def measure(self, moment: Moment) -> None:
        """One backward pass for each row."""
        J = self._given(moment.model, *self.loss) if self.loss is not None else self._first(moment)
        found = singular_values(J) if bool(torch.isfinite(J).all()) else None
        moment.emit("jacobian_spectrum", STATS, "", statistics(len(J), found))
        if found is not None and self._sparsely.due(moment.step):
            moment.table("jacobian_spectrum", {"singular_value": found.values})

    def _given(self, model: nn.Module, loss_fn: Callable[..., Any], batch: Any) -> Tensor:
        closure = LossClosure(model, loss_fn, batch)
        self._allowed(closure.size or 1, closure.point(self.parameters).n)
        return jacobian_rows(closure, self.parameters, "losses")

    def _first(self, moment: Moment) -> Tensor:
        """Gradients ``(row, n)`` of rows of the first batch."""
        first = moment.first
        if first is None:
            raise UsageError("there is no first batch")
        model = moment.model if len(moment.models) == 1 else nn.ModuleList(moment.models)
        half = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
        tape = first.copy(torch.float32 if half else None)
        closure = LossClosure(model, tape.replay, dtype=torch.float32 if half else None)
        point = closure.point(self.parameters)
        with closure.session(point):
            # as an output of the closure, so that random numbers and buffers are in order
            calls = closure.outputs(Batch(lambda: tape.calls(F.cross_entropy), lambda x: x))
            parts = [_cross_entropy.losses(args, kwargs) for args, kwargs, _ in calls]
            losses = [each[counted] for each, counted in parts if each.requires_grad]
            if not losses:
                raise UsageError("the loss has no cross-entropy that these parameters matter to; pass loss=")
            each = torch.cat(losses)
            kept = self._allowed(min(self.rows, len(each)), point.n)
            return gradients(each[torch.linspace(0, len(each) - 1, kept).long()], point)

    def _allowed(self, count: int, n: int) -> int:
        """How many of ``count`` gradients of ``n`` numbers fit; of given data all have to, of the first batch a few."""
        fit = int(MEMORY / (4 * n))
        if fit < (count if self.loss is not None else min(count, FEWEST)):
            raise UsageError(
                f"the gradients of {count} rows by {n:,} parameters take {4e-9 * count * n:.3g} GB; pass parameters="
            )
        return min(count, fit)


def statistics(rows: int, found: SingularValues | None) -> tuple[float, ...]:
    """`STATS`; NaN where gradients are not finite (``found`` is None then), or are zero."""
    if found is None:
        return rows, *(float("nan"),) * 5
    values = found.values[: found.rank]
    ends = (values[0], values[-1]) if found.rank else (0.0, np.nan)
    return rows, found.rank, found.effective_rank, found.condition, float(ends[0]), float(ends[1])
