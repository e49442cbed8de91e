"""The classes that a classification loss is called with: how many of them a batch holds, and how many the last ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from monitor.record.mode import Watcher
from monitor.record.site import Site

#: Steps between two looks.
EVERY = 20
#: Looks that the pool remembers: each weighs 1 / MEMORY less than the one after it.
MEMORY = 50
#: Most classes that are counted, and most labels of a batch that are looked at.
CLASSES, LABELS = 1024, 4096
STATS = ("labels", "within", "mean_within", "pooled", "looks")


@dataclass
class _Pool:
    """Sums over looks, each weighing a little less than the one after it."""

    shares: Any  # (class,) share of each in a batch
    within: Any = 0.0  # chance that two labels of a batch are the same
    weight: Any = 0.0
    looks: int = 0


class LabelsSite(Site):
    """Counts the classes of all losses of a step that are trained on, and pools their shares over the last looks.

    Labels are of rows: what is classified at every position (pixels) is not looked at.
    """

    name = "labels"
    inside_every = EVERY

    def __init__(self, recorder: Any) -> None:
        super().__init__(recorder)
        self._pending: list[tuple[str, Any]] = []  # (class,) counts of the calls since the last backward
        self._counts: dict[str, Any] = {}  # of those that are trained on in this step
        self._pools: dict[str, _Pool] = {}

    def after(self) -> dict[Any, Watcher]:
        """Watch the losses of classes and of one class or another."""
        losses = (F.cross_entropy, F.nll_loss, F.binary_cross_entropy, F.binary_cross_entropy_with_logits)
        return {func: partial(self._called, i < 2) for i, func in enumerate(losses)}

    def _called(self, many: bool, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if not self.rec.training or not self.due(EVERY):
            return
        z = args[0] if args else kwargs.get("input")
        y = args[1] if len(args) > 1 else kwargs.get("target")
        if not (isinstance(z, Tensor) and isinstance(y, Tensor) and result.requires_grad and y.numel()):
            return
        if many:
            if z.dim() != 2 or not 2 <= z.shape[1] <= CLASSES or y.is_floating_point():
                return
            ignored = int(kwargs.get("ignore_index", args[4] if len(args) > 4 else -100))
            counts = _count(y.detach(), z.shape[1], ignored)
        else:
            if y.dim() > 2 or y.numel() != len(y):  # several answers to each row
                return
            counts = _count(y.detach().reshape(-1) > 0.5, 2, -100)
        kind = "cross_entropy" if many else "binary_cross_entropy"
        calls = sum(name.startswith(kind) for name, _ in self._pending)
        self._pending.append((f"{kind}[{calls}]" if calls else kind, counts))

    def on_backward(self) -> None:
        """Keep what was seen since the last backward: these losses are being trained on."""
        for name, counts in self._pending:
            seen = self._counts.get(name)
            if seen is None or _alike(seen, counts):
                self._counts[name] = counts if seen is None else seen + counts
        self._pending.clear()

    def on_row(self) -> None:
        """Record the labels of all micro-batches of the step."""
        for name, counts in self._counts.items():
            self._pool(name, counts)
        self._counts.clear()
        self._pending.clear()

    def _pool(self, name: str, counts: Any) -> None:
        number = counts.sum()
        pairs = number * (number - 1)
        known: Any = 1.0
        if isinstance(counts, Tensor):  # where it costs a sync to know whether there are two labels to compare
            known = (pairs > 0).float()
            number, pairs = number.clamp(min=1), pairs.clamp(min=1)
        elif pairs == 0:
            return
        within = (counts * (counts - 1)).sum() / pairs
        pool = self._pools.get(name)
        if pool is None or not _alike(pool.shares, counts):  # a model may have been moved
            pool = self._pools[name] = _Pool(counts * 0)
        left = 1 - 1 / MEMORY
        pool.shares = pool.shares * left + known * counts / number
        pool.within = pool.within * left + known * within
        pool.weight = pool.weight * left + known
        pool.looks += 1
        pooled = (pool.shares * pool.shares).sum() / pool.weight**2
        values = [number, within, pool.within / pool.weight, pooled]
        if isinstance(number, Tensor):
            values = torch.stack(values)
            self.rec.emit("labels", STATS, name, values, at=slice(0, 4))
            self.rec.emit("labels", STATS, name, (float(pool.looks),), at=slice(4, 5))
        else:
            self.rec.emit("labels", STATS, name, [float(x) for x in (*values, pool.looks)])


def _alike(a: Any, b: Any) -> bool:
    """True if both are counts of as many classes and lie in the same place."""
    return len(a) == len(b) and getattr(a, "device", None) == getattr(b, "device", None)


def _count(y: Tensor, classes: int, ignored: int) -> Any:
    """How often each class occurs, ``(classes,)``: float64 of numpy on a CPU, else float32 where ``y`` is."""
    y = y.reshape(-1)
    y = y[:: -(-len(y) // LABELS)]
    if y.is_cpu:
        labels = y.numpy()
        return np.bincount(labels[(labels >= 0) & (labels < classes) & (labels != ignored)], minlength=classes) * 1.0
    y = y.long()
    counted = ((y >= 0) & (y < classes) & (y != ignored)).float()
    return counted.new_zeros(classes).scatter_add_(0, y.clamp(0, classes - 1), counted)
