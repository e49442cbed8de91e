"""Embeddings: rows that nothing has ever been learnt for."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from monitor.record.passes.embedding import STATS, row_stats, touched
from monitor.record.site import Site

#: Steps between two looks, and one look more. A moment of a row that has no more gradients fades to an exact 0, but at
#: the usual decays only after hundreds of steps, so that none is missed in between.
EVERY, EARLY = 100, 10
#: Running means of gradients or of their squares, under the names that optimizers give them.
_MOMENTS = ("exp_avg_sq", "square_avg", "sum", "momentum_buffer", "exp_avg")


class EmbeddingSite(Site):
    """Counts rows without a gradient since the start, every hundredth step and at the tenth."""

    name = "embedding"

    def __init__(self, recorder: Any) -> None:
        super().__init__(recorder)
        self._seen: weakref.WeakKeyDictionary[nn.Module, Tensor] = weakref.WeakKeyDictionary()
        self._unknown = False

    def listens(self, step: int) -> bool:
        """True if it is time."""
        return step % EVERY == 0 or step == EARLY

    def on_step(self, optimizer: Optimizer) -> None:
        """Look at the moments of every embedding that this optimizer updates."""
        updated = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for root in self.rec.roots:
            for module in root.modules():
                if not isinstance(module, nn.Embedding | nn.EmbeddingBag) or id(module.weight) not in updated:
                    continue
                moment = _moment(optimizer, module.weight)
                if moment is None:
                    self._unknown = self._unknown or module.weight.grad is not None
                    continue
                now, before = touched(moment), self._seen.get(module)
                if before is not None and before.shape == now.shape and before.device == now.device:
                    now |= before
                self._seen[module] = now
                name = self.rec.parameter(module.weight)
                values = row_stats(now)
                self.rec.emit(
                    "embedding", STATS, name, values if isinstance(values, list) else values.to(self.rec.device)
                )

    def missing(self) -> Sequence[tuple[str, str]]:
        """Rows, where the optimizer remembers no gradient. A model without embeddings lacks nothing."""
        if not self._unknown or self._seen:
            return ()
        return (("embedding_rows", "the optimizer keeps no running mean of gradients"),)


def _moment(optimizer: Optimizer, weight: Tensor) -> Tensor | None:
    """``(row, feature)`` running mean of the gradients of ``weight``; None if the optimizer has none."""
    state = optimizer.state.get(weight, {})  # no [weight]: it would add an empty state
    for name in _MOMENTS:
        moment = state.get(name)
        if isinstance(moment, Tensor):
            moment = moment if type(moment) is Tensor else getattr(moment, "_local_tensor", moment)
            return moment if moment.dim() == 2 and moment.numel() and not moment.is_sparse else None
    return None
