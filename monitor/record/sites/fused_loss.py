"""Cross-entropies that take the last hidden states and the output weights, and never hold all logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from monitor.record.mode import Watcher
from monitor.record.passes import logit_rows, loss_rows
from monitor.record.sites.logits import _IGNORE, LogitsSite, _counting, _loss_dtype

#: Steps between two looks: one multiplies sampled rows by all of the output weights.
EVERY = 20
#: Rows sampled on a CPU and on an accelerator, and the most logits (64 MiB of float32) made for them.
ROWS_CPU, ROWS, MOST = 16, 256, 1 << 24


class FusedLossSite(LogitsSite):
    """Statistics of a few rows of every `torch.nn.functional.linear_cross_entropy` (torch 2.13 and later).

    Their logits are made again from hidden states and weights. Other fused losses are functions of their own, which no
    function mode sees; their value is recorded like any other loss.
    """

    name = "fused_loss"
    dense = True

    def after(self) -> dict[Any, Watcher]:
        """Watch the function where torch has it."""
        func = getattr(F, "linear_cross_entropy", None)
        return {} if func is None else {func: self._fused}

    def _fused(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        h, w, y = (
            args[i] if len(args) > i else kwargs.get(k) for i, k in enumerate(("input", "linear_weight", "target"))
        )
        bias = kwargs.get("linear_bias")
        if not (self.rec.training and isinstance(result, Tensor) and result.requires_grad and self.due(EVERY)):
            return
        if not (isinstance(h, Tensor) and isinstance(w, Tensor) and isinstance(y, Tensor)):
            return
        if type(h) is not Tensor or type(w) not in (Tensor, nn.Parameter) or w.dim() != 2 or w.shape[0] < 2:
            return  # distributed, or targets for every place of an image
        if h.numel() == 0 or y.shape != h.shape[:-1] or y.is_floating_point():
            return  # nothing, or probabilities as targets
        h, w, y = h.detach().reshape(-1, h.shape[-1]), w.detach(), y.reshape(-1)
        most = ROWS_CPU if h.device.type == "cpu" else ROWS
        stride = -(-len(h) // max(1, min(most, MOST // w.shape[0]))) | 1
        start = self.rec.random.randrange(min(stride, len(h)))
        some, targets = h[start::stride], y[start::stride]
        with torch.autocast(h.device.type, enabled=False):  # which would make a copy of all weights
            z = F.linear(some.to(w.dtype), w, None if bias is None else bias.detach().to(w.dtype))
        ignore = kwargs.get("ignore_index")
        ignore = _IGNORE if ignore is None else int(ignore)
        dtype = _loss_dtype(h)
        name = "linear_cross_entropy" if self._calls == 0 else f"linear_cross_entropy[{self._calls}]"
        self._calls += 1
        stats = logit_rows.logit_rows(z, targets, dtype, _counting(targets, ignore))
        seen = loss_rows.loss_rows(z.to(dtype).log_softmax(1), targets, ignore, z)
        self._pending.append(("logit_rows", logit_rows.STATS, name, stats, logit_rows.MERGE, ()))
        self._pending.append(("loss_rows", loss_rows.STATS, name, seen, loss_rows.MERGE, ()))

    def on_backward(self) -> None:
        """Keep what was seen since the last backward."""
        super().on_backward()
        if self._seen:
            for site in self.rec.sites:
                if type(site) is LogitsSite:
                    site._seen = True  # logits are recorded, if not by that site

    def missing(self) -> tuple[()]:
        """Nothing: a training without such a loss lacks none."""
        return ()
