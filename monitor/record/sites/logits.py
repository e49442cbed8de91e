"""The logits and targets that a classification loss is called with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from monitor.record.mode import Watcher
from monitor.record.passes import logit_rows, loss_rows
from monitor.record.private import saved
from monitor.record.ring import Values
from monitor.record.site import Site

#: Read all rows up to this many logits; above it, about `ROWS` rows evenly spaced from a random start.
ALL, ROWS = 1 << 14, 256
#: Most logits of which a copy is made (64 MiB of float32): where rows do not lie one after another.
COPIED = 1 << 24
#: Most logits whose log-probabilities are made at a time, where those of the loss cannot be read: 4 MiB of float32, on
#: an accelerator 64.
MADE, MADE_DEVICE = 1 << 20, 1 << 24
#: Steps between two looks at what needs an exponential of every logit, on a CPU and on an accelerator, where the number
#: of its operations is what it costs.
EVERY, EVERY_DEVICE = 5, 20
_IGNORE = -100


class LogitsSite(Site):
    """Statistics of the rows of every cross-entropy call whose result can be trained on.

    Zero losses, right answers and the first choice's mass come from all rows of the log-probabilities that autograd
    has saved, wherever reading them runs nothing of the user's (no saved-tensor hook is active); else from
    the sampled rows. Norms, margins, entropy and headroom need an exponential of every logit and are sampled.
    """

    name = "logits"
    dense = True

    def __init__(self, recorder: Any) -> None:
        super().__init__(recorder)
        self._pending: list[tuple[str, tuple[str, ...], str, Values, tuple[str, ...], tuple[int, ...]]] = []
        self._calls = 0
        self._seen = False

    def after(self) -> dict[Any, Watcher]:
        """Watch the two functions that every classification loss of torch ends in."""
        return {F.cross_entropy: self._cross_entropy, F.nll_loss: self._nll_loss}

    def _cross_entropy(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        self._classified(args, kwargs, result, ())

    def _nll_loss(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        # log-probabilities are the logits up to a shift of each row: what a shift changes is not known
        self._classified(args, kwargs, result, _NEEDS_LOGITS)

    def _classified(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, unknown: tuple[int, ...]) -> None:
        z = args[0] if args else kwargs.get("input")
        y = args[1] if len(args) > 1 else kwargs.get("target")
        if not (
            isinstance(z, Tensor) and isinstance(y, Tensor) and isinstance(result, Tensor) and result.requires_grad
        ):
            return
        if not self.rec.training or z.numel() == 0:
            return
        if z.dim() == 1:
            z, y = z.unsqueeze(0), y.unsqueeze(0)
        if z.shape[1] < 2:  # of one class every loss is exactly 0, which says nothing
            return
        ignore = int(kwargs.get("ignore_index", args[4] if len(args) > 4 else _IGNORE))
        classes = not y.is_floating_point()
        y = y.long() if classes else y  # of 8 bits, none would be told from a class to be ignored that is below 0
        logp = _saved_log_probabilities(result)
        if logp is not None and logp.shape != z.shape:
            logp = None
        name = "cross_entropy" if self._calls == 0 else f"cross_entropy[{self._calls}]"
        self._calls += 1
        dtype = logp.dtype if logp is not None else _loss_dtype(z)
        ignored = y == ignore if classes and not z.is_cpu else None
        if self.due(EVERY if z.is_cpu else EVERY_DEVICE):
            rows, targets, left_out = self._sample(z, y if classes else None, ignored)
            if z.is_cpu:
                stats = logit_rows.logit_rows(rows, targets, dtype, _counting(targets, ignore))
            else:
                stats = logit_rows.on_device(rows, targets, dtype, left_out)
            unknown = unknown if classes else (*unknown, *_NEEDS_CLASSES)
            self._pending.append(("logit_rows", logit_rows.STATS, name, stats, logit_rows.MERGE, unknown))
        if classes:
            if logp is None:
                rows, targets, left_out = self._sample(z, y, ignored)
                assert targets is not None
                seen = _own_rows(rows, targets, dtype, ignore, left_out)
            elif ignored is not None:
                seen = loss_rows.on_device(logp, y, ignored, z.detach())
            else:
                seen = loss_rows.loss_rows(logp, y, ignore, z.detach())
            self._pending.append(("loss_rows", loss_rows.STATS, name, seen, loss_rows.MERGE, ()))

    def _sample(self, z: Tensor, *beside: Tensor | None) -> tuple[Tensor, *tuple[Tensor | None, ...]]:
        """``(row, class)`` view of all rows or an evenly spaced sample, and what stands beside them.

        The stride is odd, so that over a sequence length that is a power of two every position is met.
        """
        rows = z.detach().movedim(1, -1)
        count = rows.shape[:-1].numel()
        if rows.is_contiguous():  # as of a language model, (batch, class, token): rows are read where they lie
            rows, beside = rows.flatten(0, -2), tuple(None if x is None else x.flatten() for x in beside)
        if rows.dim() == 2 and rows.numel() <= ALL:
            return rows, *beside
        stride = max(1, count // ROWS) | 1
        start = self.rec.random.randrange(min(stride, count))
        if rows.dim() == 2:
            return rows[start::stride], *(None if x is None else x[start::stride] for x in beside)
        if rows.numel() <= ALL:
            start, stride = 0, 1
        else:
            stride = max(stride, -(-count * rows.shape[-1] // COPIED) | 1)
        places = np.stack(np.unravel_index(np.arange(start, count, stride), rows.shape[:-1]))
        where = torch.from_numpy(places).to(z.device, non_blocking=True).unbind()
        return rows[where], *(None if x is None else x[where] for x in beside)

    def on_backward(self) -> None:
        """Keep what was seen since the last backward: these losses are being trained on."""
        for reads, stats, name, values, merge, unknown in self._pending:
            self._seen = True
            self.rec.emit(reads, stats, name, values, merge, absent=unknown)
        self._pending.clear()
        self._calls = 0

    def on_row(self) -> None:
        """Forget calls whose result was never trained on."""
        self._pending.clear()
        self._calls = 0

    def missing(self) -> Sequence[tuple[str, str]]:
        """Everything about logits, if no classification loss was seen."""
        if self._seen:
            return ()
        why = "no call of torch's cross_entropy or nll_loss was seen in a training forward"
        return (("logit_norm", why), ("loss_zero_frac", why))


_NEEDS_CLASSES = tuple(logit_rows.STATS.index(s) for s in ("sum_true_margin", "collapsed", "sum_rate", "sum_zscore"))
_NEEDS_LOGITS = tuple(
    logit_rows.STATS.index(s)
    for s in ("sum_norm", "max_norm", "sumsq", "sum_z", "max_z", "min_z", "sum_lse", "sumsq_lse")
)


def _counting(targets: Tensor | None, ignore: int) -> Tensor | None:
    """Which rows count; None if all do, which is known without a sync only on a CPU."""
    if targets is None:
        return None
    valid = targets != ignore
    return None if valid.device.type == "cpu" and bool(valid.all()) else valid


def _own_rows(rows: Tensor, targets: Tensor, dtype: torch.dtype, ignore: int, ignored: Tensor | None = None) -> Values:
    """The statistics of `loss_rows` for rows whose log-probabilities are made here, some at a time.

    ``ignored`` is known on an accelerator.
    """
    part = max(1, (MADE if ignored is None else MADE_DEVICE) // rows.shape[1])
    parts: list[Any] = []
    for i in range(0, len(rows), part):
        r, y = rows[i : i + part], targets[i : i + part]
        logp = r.to(dtype).log_softmax(1)
        if ignored is None:
            parts.append(loss_rows.loss_rows(logp, y, ignore, r))
        else:
            parts.append(loss_rows.on_device(logp, y, ignored[i : i + part], r))
    if len(parts) == 1:
        return parts[0]
    return torch.stack(parts).sum(0) if isinstance(parts[0], Tensor) else [sum(c) for c in zip(*parts, strict=True)]


def _loss_dtype(z: Tensor) -> torch.dtype:
    """The dtype in which torch computes the loss: float32 under autocast, else that of the logits."""
    return torch.float32 if torch.is_autocast_enabled(z.device.type) and z.dtype != torch.float64 else z.dtype


def _saved_log_probabilities(loss: Tensor) -> Tensor | None:
    """What the log-softmax node of ``loss`` has saved for backward, if it can be read without running anything."""
    node = loss.grad_fn
    for _ in range(6):
        if node is None:
            return None
        if type(node).__name__ == "LogSoftmaxBackward0":
            return saved(node, "result")
        node = next((n for n, _ in node.next_functions if n is not None), None)
    return None
