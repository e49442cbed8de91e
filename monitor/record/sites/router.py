"""The routers of mixtures of experts, found where they choose: in the call of top-k, without a change to the model.

A choice is a router's if the scores it is made from come, through a softmax or a sigmoid (or anything, in a module with
a name like a router's), from one matrix multiplication by a parameter that has as many rows as there are scores. The
autograd graph says so, and names the parameter. Every router of transformers and most written by hand are like that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from monitor.record.mode import Watcher
from monitor.record.passes.router import LOAD_STATS, STATS, Vector, balance, joined, router_sums
from monitor.record.private import saved
from monitor.record.site import Site

#: Steps between two looks.
EVERY = 5
#: Scores read for probabilities: all up to this many, else those of evenly spaced tokens. Loads count every token.
SCORES = 1 << 15
#: Most experts of one router, and loads recorded altogether: beyond, only the router as a whole is.
EXPERTS, LOADS = 1024, 4096
#: Operations between the scores and the multiplication they come from.
_HOPS = 24
_NAME = re.compile(r"(?i)router|gat(e|ing)\b|switch")
_GATES = {"SoftmaxBackward0", "SigmoidBackward0"}
_PLAIN = {"ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "ToCopyBackward0", "AliasBackward0"}
#: Scores that meet others on their way come from several routers, or from none.
_NEVER = {"CatBackward0", "StackBackward0", "BmmBackward0", "GatherBackward0", "EmbeddingBackward0"}
_NEEDS_LOGITS = tuple(STATS.index(s) for s in ("sumsq_lse", "max_z"))
_NEEDS_ROWS = (*(STATS.index(s) for s in ("sum_entropy", "mean_entropy")), *_NEEDS_LOGITS)


@dataclass
class _Source:
    """Where scores come from: the multiplication, its parameter, and what lies between them and it."""

    product: Any
    weight: Tensor
    transposed: bool
    gate: Any = None
    plain: bool = True  # between the multiplication and the gate there is nothing that changes a value
    bare: bool = True  # nor between it and the scores


@dataclass
class _Seen:
    """Sums of one router over the micro-batches of a step; ``absent`` names what was not known in some of them."""

    sums: Vector
    absent: tuple[int, ...]
    epoch: int = -1


class RouterSite(Site):
    """Loads, entropies and scores of every router, every `EVERY` steps."""

    name = "router"

    def __init__(self, recorder: Any) -> None:
        super().__init__(recorder)
        self._pending: dict[tuple[str, int], _Seen] = {}
        self._row: dict[str, _Seen] = {}
        self._sizes: dict[str, int] = {}

    def after(self) -> dict[Any, Watcher]:
        """Watch both ways to call top-k."""
        return {torch.topk: self._topk, torch.Tensor.topk: self._topk}

    def _topk(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if not self.rec.training or not self.rec.inside_forward or not self.due(EVERY):
            return
        scores = args[0] if args else kwargs.get("input")
        chosen = result[1]
        if type(scores) is not Tensor or type(chosen) is not Tensor or scores.grad_fn is None:
            return
        experts = scores.shape[-1]
        dim = kwargs.get("dim", args[2] if len(args) > 2 else -1)
        if dim not in (-1, scores.dim() - 1) or scores.dim() < 2 or chosen.numel() == 0:
            return
        if not 2 <= experts <= EXPERTS or chosen.shape[-1] >= experts:
            return
        source = _source(scores.grad_fn, experts)
        if source is None:
            return
        name = self.rec.parameter(source.weight).rpartition(".")[0]
        if source.gate is None and not _NAME.search(name):
            return
        tokens = chosen.numel() // chosen.shape[-1]
        some = self._sample(tokens, experts)
        z = _logits(source, scores, some)
        absent = () if z is not None else _NEEDS_LOGITS
        if z is None:
            z = _log_probabilities(source, scores, some)
            absent = absent if z is not None else _NEEDS_ROWS
        sums = router_sums(chosen.detach().reshape(tokens, -1), experts, z)
        # a second choice from the same scores (among groups, then among experts) stands for the first
        self._pending[name, source.product._sequence_nr()] = _Seen(sums, absent)

    def _sample(self, tokens: int, experts: int) -> slice:
        stride = -(-tokens * experts // SCORES)
        if stride <= 1:
            return slice(None)
        stride |= 1  # odd, so that over a length that is a power of two every position is met
        return slice(self.rec.random.randrange(min(stride, tokens)), None, stride)

    def on_backward(self) -> None:
        """Keep what was chosen since the last backward: it is being trained on."""
        if not self._pending:
            return
        for (name, _), new in self._pending.items():
            old = self._row.get(name)
            if old is not None and old.epoch == self.rec.epoch and len(old.sums) == len(new.sums):
                new = _Seen(joined(old.sums, new.sums), tuple({*old.absent, *new.absent}))
            new.epoch = self.rec.epoch
            self._row[name] = new
        names = list(dict.fromkeys(name for name, _ in self._pending))
        self._pending.clear()
        reduced = [balance(self._row[name].sums) for name in names]
        self.rec.emit_many("router", STATS, names, _stack([r for r, _ in reduced]))
        for name, (values, _) in zip(names, reduced, strict=True):
            if self._row[name].absent:
                self.rec.emit("router", STATS, name, values, absent=self._row[name].absent)
        self._loads(names, [load for _, load in reduced])

    def _loads(self, names: list[str], loads: list[Vector]) -> None:
        places, values = [], []
        for name, load in zip(names, loads, strict=True):
            known = self._sizes.get(name)
            if known is None:
                room = LOADS - sum(self._sizes.values())
                known = self._sizes[name] = len(load) if len(load) <= room else 0
            if known == len(load):
                places += [f"{name}[{e}]" for e in range(known)]
                values.append(load)
        if places:
            joint: Any = torch.cat(values) if isinstance(values[0], Tensor) else np.concatenate(values)
            self.rec.emit_many("router_load", LOAD_STATS, places, joint)

    def on_row(self) -> None:
        """Forget choices whose result was never trained on, and begin the next step."""
        self._pending.clear()
        self._row.clear()

    def missing(self) -> Sequence[tuple[str, str]]:
        """Loads of experts beyond `LOADS`. A model without routers misses nothing."""
        left = [name for name, size in self._sizes.items() if size == 0]
        if not left:
            return ()
        return (("router_load", f"more than {LOADS:,} experts: loads of {left[0]} and {len(left) - 1} others are not"),)


def _stack(rows: list[Any]) -> Any:
    return np.stack(rows) if isinstance(rows[0], np.ndarray) else torch.stack(rows)


def _chain(node: Any) -> Iterator[Any]:
    """``node`` and what its first input that was computed comes from, and so on."""
    for _ in range(_HOPS):
        if node is None:
            return
        yield node
        inputs = [n for n, _ in node.next_functions if n is not None and type(n).__name__ != "AccumulateGrad"]
        node = inputs[0] if inputs else None


def _source(node: Any, experts: int) -> _Source | None:
    """The multiplication by a parameter that scores come from; None if they are no router's."""
    gate, plain, bare = None, True, True
    for n in _chain(node):
        kind = type(n).__name__
        if kind in _NEVER:
            return None
        if kind in ("AddmmBackward0", "MmBackward0"):
            at = n.next_functions[-1][0]
            transposed = type(at).__name__ == "TBackward0"
            weight = _parameter(at)
            if weight is None or weight.dim() != 2 or weight.shape[0 if transposed else 1] != experts:
                return None
            return _Source(n, weight, transposed, gate, plain, bare)
        if kind in _GATES:
            # of a gate after another only the one next to the multiplication counts
            gate, plain, bare = n, True, False
        elif kind not in _PLAIN:
            plain = bare = False
    return None


def _parameter(node: Any) -> Tensor | None:
    """The parameter behind a transposition and casts."""
    for _ in range(4):
        if node is None:
            return None
        if type(node).__name__ == "AccumulateGrad":
            return node.variable
        node = node.next_functions[0][0] if node.next_functions else None
    return None


def _logits(source: _Source, scores: Tensor, some: slice) -> Tensor | None:
    """``(row, expert)`` scores before the gate of some tokens; None if they cannot be known."""
    if source.bare:
        return scores.detach().reshape(-1, scores.shape[-1])[some]
    if not source.plain:
        return None
    product = source.product
    x = saved(product, "mat1") if type(product).__name__ == "AddmmBackward0" else saved(product, "self")
    if x is None or x.dim() != 2:
        return None
    weight = source.weight.detach().to(x.dtype)
    z = x[some] @ (weight.T if source.transposed else weight)
    if type(product).__name__ == "AddmmBackward0":
        bias = _parameter(product.next_functions[0][0])
        if bias is None:
            return None
        z = z + bias.detach()
    return z


def _log_probabilities(source: _Source, scores: Tensor, some: slice) -> Tensor | None:
    """Logarithms of what the softmax gave to some tokens; None if it cannot be read or is no softmax."""
    if source.gate is None or type(source.gate).__name__ != "SoftmaxBackward0":
        return None
    p = scores.detach() if scores.grad_fn is source.gate else saved(source.gate, "result")
    if p is None or p.shape[-1] != scores.shape[-1]:
        return None
    return p.reshape(-1, p.shape[-1])[some].float().log()
