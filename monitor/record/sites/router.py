"""The routers of mixtures of experts, found where they choose: in the call of top-k or of a maximum.

A choice is a router's if the scores it is made from come, through a softmax or a sigmoid (or anything, in a module with
a name like a router's), from one matrix multiplication by a parameter that has as many rows as there are scores. The
autograd graph says so, and names the parameter. Every router of transformers and most written by hand are like that.
Many a classifier takes a maximum of its scores: there the name must be like a router's, or experts must stand near by.

A model that limits the capacity of its experts numbers the assignments of each by a cumulative sum of ones and compares
the numbers with the limit; both calls are watched too.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from monitor.record.experts import Router, spread
from monitor.record.mode import Watcher
from monitor.record.passes.experts import ALIKE_STATS, NORM_STATS, alike, norms, sample
from monitor.record.passes.router import (
    LIMITS,
    LOAD_STATS,
    STATS,
    Vector,
    add_choice,
    balance,
    balance_on_device,
    joined,
    joined_on_device,
    left_out,
    limits,
    on_device,
    router_sums,
    z_of,
)
from monitor.record.private import saved
from monitor.record.site import REPLICAS, START, Site

#: Steps between two looks.
EVERY = 5
#: Steps between two looks at the parameters of the experts.
EXPERTS_EVERY = 100
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
_NEEDS_LOGITS = tuple(STATS.index(s) for s in ("sumsq_lse", "max_z", "early_z"))
_NEEDS_ROWS = (*(STATS.index(s) for s in ("sum_entropy", "mean_entropy", "sum_margin")), *_NEEDS_LOGITS)
_EARLY = STATS.index("early_z")
#: The z-loss is compared with that at this part of the steps so far; those in between are remembered ``_APART`` apart.
PART, _APART = 0.05, 1.1
_NUMBERS = (Tensor.cumsum, torch.cumsum)
_COMPARISONS = (Tensor.lt, Tensor.le, torch.lt, torch.le)
_NO_SCORES = "the scores before the softmax cannot be read, as under activation checkpointing"
_REENTRANT = (
    "a top-k that may be a router's ran without gradients, as under reentrant activation checkpointing, where nothing "
    "can be told of it"
)
_MAXIMA = (Tensor.argmax, torch.argmax, Tensor.max, torch.max)


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
    """Sums of one router, of each micro-batch of a step; ``absent`` names what was not known in some of them."""

    epoch: int
    sums: list[Vector]
    absent: set[int]


@dataclass
class _Choice:
    """One call of a router whose result has not been trained on yet.

    On an accelerator its ``sums`` are made when it is, with those of all routers, from the scores ``z`` and what was
    ``chosen``, unless the training has written over them by then (``versions``).
    """

    sums: np.ndarray | None
    absent: tuple[int, ...]
    scores: int  # address of the scores, which stay alive until backward
    chosen: Tensor  # (token, k)
    experts: int
    queues: list[Tensor]  # (token, expert): what cumulative sums were taken of since
    z: Tensor | None = None  # (row, expert)
    versions: tuple[int, ...] = ()
    lost: list[Tensor] = field(default_factory=list[Tensor])  # of `left_out`

    def held(self) -> tuple[int, ...]:
        """The versions that ``versions`` are compared with."""
        return tuple(x._version for x in (self.chosen, self.z) if x is not None)

    def fits(self, x: Any) -> bool:
        """True if ``x`` has an entry for every token and expert."""
        return type(x) is Tensor and x.shape[-1:] == (self.experts,) and x.numel() == len(self.chosen) * self.experts


class RouterSite(Site):
    """Loads, entropies and scores of every router, every `EVERY` steps."""

    name = "router"
    dense = True
    inside_every = EVERY

    def __init__(self, recorder: Any) -> None:
        super().__init__(recorder)
        #: Every router found so far, by name.
        self.routers: dict[str, Router] = {}
        self._others: set[str] = set()  # what takes a maximum and is no router
        self._pending: dict[tuple[str, int], _Choice] = {}
        self._row: dict[str, _Seen] = {}
        self._written: set[str] = set()  # routers whose choice or scores the training writes over
        self._tuples: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._sizes: dict[str, int] = {}
        self._samples: dict[str, list[Tensor]] = {}
        self._past: dict[str, list[tuple[int, Any]]] = {}
        self._spread: tuple[str, str] | None = None  # a router whose experts are spread, and over what
        self._without_gradients = False  # a choice that may be a router's
        self._without_scores = True  # of every router so far

    def after(self) -> dict[Any, Watcher]:
        """Watch every way to call top-k, a maximum, and what a limit of capacity is made of."""
        ways = {torch.topk: self._topk, torch.Tensor.topk: self._topk}
        ways |= dict.fromkeys(_MAXIMA, self._maximum) | dict.fromkeys(_NUMBERS, self._numbered)
        return ways | dict.fromkeys(_COMPARISONS, self._limited)

    def listens(self, step: int) -> bool:
        """True if it is time, for the routers or for their experts."""
        return super().listens(step) or (step % EXPERTS_EVERY == 0 and step % self.rec.every == 0)

    def _looking(self) -> bool:
        return self.rec.training and self.rec.inside_forward and self.due(EVERY)

    def _topk(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        dim = kwargs.get("dim", args[2] if len(args) > 2 else -1)
        if self._looking() and result[1].numel():
            self._choose(args[0] if args else kwargs.get("input"), dim, result[1])

    def _maximum(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if not self._looking() or not isinstance(dim, int):
            return
        chosen = result if isinstance(result, Tensor) else result[1]
        scores = args[0] if args else kwargs.get("input")
        if not (kwargs.get("keepdim") or (len(args) > 2 and args[2])):
            chosen = chosen.unsqueeze(-1)
        if chosen.numel():
            self._choose(scores, dim, chosen, largest=True)

    def _choose(self, scores: Any, dim: int, chosen: Any, largest: bool = False) -> None:
        if type(scores) is not Tensor or type(chosen) is not Tensor:
            return
        experts = scores.shape[-1]
        if dim not in (-1, scores.dim() - 1) or scores.dim() < 2:
            return
        if not 2 <= experts <= EXPERTS or chosen.shape[-1] >= experts:
            return
        if scores.grad_fn is None:
            self._without_gradients |= not largest and not torch.is_grad_enabled()
            return
        source = _source(scores.grad_fn, experts)
        if source is None:
            return
        name = self.rec.parameter(source.weight).rpartition(".")[0]
        chosen = chosen.detach().reshape(-1, chosen.shape[-1])
        if not self._is_router(name, source, chosen.shape[1], largest):
            return
        key, address = (name, source.product._sequence_nr()), scores.data_ptr()
        before = self._pending.get(key) if largest else None
        if before is not None and before.scores == address:
            return  # the same maximum, once for its place and once for its value
        if before is not None:
            # one maximum after another of the same scores: the second expert of each token
            before.chosen = torch.cat((before.chosen, chosen), 1)
            before.versions = before.held()
            if before.sums is not None:
                add_choice(before.sums, router_sums(chosen, experts, None), before.chosen.numel())
            self.routers[name].k = before.chosen.shape[1]
            return
        some = self._sample(len(chosen), experts)
        z = _logits(source, scores, some)
        absent = () if z is not None else _NEEDS_LOGITS
        if z is None:
            z = _log_probabilities(source, scores, some)
            absent = absent if z is not None else _NEEDS_ROWS
        self._without_scores = self._without_scores and bool(absent)
        # a second choice from the same scores (among groups, then among experts) stands for the first
        choice = self._pending[key] = _Choice(None, absent, address, chosen, experts, [])
        if chosen.is_cpu:
            choice.sums = router_sums(chosen, experts, z)
            return
        if name in self._written:
            choice.chosen, z = chosen.clone(), None if z is None else z.clone()
        choice.z = z
        choice.versions = choice.held()

    def _is_router(self, name: str, source: _Source, k: int, largest: bool) -> bool:
        if name in self.routers or (largest and name in self._others):
            return name in self.routers
        known = bool(_NAME.search(name)) or (source.gate is not None and not largest)
        if known or source.gate is not None:
            router = Router.of(self.rec.roots, name, source.weight, source.transposed, k)
            if known or router.parts(self.rec.roots):
                self.routers[name] = router
                return True
        if largest:
            self._others.add(name)
        return False

    def _numbered(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """A cumulative sum: of what a router chose, it numbers the assignments of each expert."""
        if self._pending and self._looking() and args:
            newest = self._pending[next(reversed(self._pending))]
            if newest.fits(args[0]):
                newest.queues.append(args[0].detach().reshape(-1, newest.experts))

    def _limited(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """A comparison: of those numbers, it says which assignments are within the capacity."""
        if self._pending and self._looking() and args:
            newest = self._pending[next(reversed(self._pending))]
            if newest.queues and newest.fits(args[0]) and newest.fits(result):
                wanted, room = newest.queues.pop(0), result.detach().reshape(-1, newest.experts)
                if newest.sums is not None:
                    limits(newest.sums, newest.chosen, wanted, room)
                else:
                    newest.lost.append(left_out(newest.chosen, wanted, room))

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
        together: dict[Any, list[tuple[str, _Choice]]] = {}
        for (name, _), choice in self._pending.items():
            if choice.sums is not None:
                self._keep(name, choice, choice.sums)
            elif choice.held() != choice.versions:
                self._written.add(name)  # from now on a copy is kept
            else:
                z = choice.z
                like = None if z is None else (z.shape, z.dtype)
                alike = choice.chosen.device, choice.chosen.shape, choice.experts, like
                together.setdefault(alike, []).append((name, choice))
        self._pending.clear()
        for choices in together.values():
            z = [c.z for _, c in choices if c.z is not None]
            made = on_device([c.chosen for _, c in choices], choices[0][1].experts, z or None)
            for (name, choice), sums in zip(choices, made.unbind(), strict=True):
                for lost in choice.lost:
                    sums[LIMITS] += lost
                self._keep(name, choice, sums)

    def _keep(self, name: str, choice: _Choice, sums: Vector) -> None:
        seen = self._row.get(name)
        if seen is None or seen.epoch != self.rec.epoch or len(seen.sums[0]) != len(sums):
            seen = self._row[name] = _Seen(self.rec.epoch, [], set())
        seen.sums.append(sums)
        seen.absent |= set(choice.absent)

    def _record(self) -> None:
        """Record what was seen in this step: on an accelerator all routers at once that are alike."""
        together: dict[Any, list[str]] = {}
        for name, seen in self._row.items():
            first = seen.sums[0]
            kind = (first.device, len(seen.sums), len(first)) if isinstance(first, Tensor) else None
            together.setdefault(kind, []).append(name)
        for kind, names in together.items():
            early = [self._early(name, self._row[name].sums[0]) for name in names]
            parts: list[list[Any]] = [self._row[name].sums for name in names]
            values: Any
            loads: Any
            if kind is None:
                each = [functools.reduce(joined, p) for p in parts]
                reduced = [balance(s, math.nan if z is None else z) for s, z in zip(each, early, strict=True)]
                values, loads = np.stack([r for r, _ in reduced]), [load for _, load in reduced]
            else:
                sums = joined_on_device(parts)
                values, loads = balance_on_device(sums, _stacked(early, sums))
                each = sums.unbind()
            self._write(names, values, [z is None for z in early])
            self._loads(names, loads)
            self._remember(names, each)

    def _write(self, names: list[str], values: Any, no_early: list[bool]) -> None:
        """Write what is known of each router: ``values`` are ``(router, len(STATS))``."""
        lacks: dict[frozenset[int], list[int]] = {}
        for i, name in enumerate(names):
            absent = self._row[name].absent | ({_EARLY} if no_early[i] else set())
            lacks.setdefault(frozenset(absent), []).append(i)
        for absent, at in lacks.items():
            places = self._tuple(names[i] for i in at)
            some = values
            if len(at) < len(names):  # a list of places would be sent to an accelerator, and waited for
                some = torch.stack([values[i] for i in at]) if isinstance(values, Tensor) else values[at]
            for part in _runs(absent):
                self.rec.emit_many("router", STATS, places, some[:, part], part)

    def _remember(self, names: list[str], sums: Sequence[Vector]) -> None:
        """Keep z-losses for `_early`, now and then."""
        if self.rec.step < START:
            return
        for name, vector in zip(names, sums, strict=True):
            past = self._past.setdefault(name, [])
            if _EARLY not in self._row[name].absent and (not past or self.rec.step >= _APART * past[-1][0]):
                past.append((self.rec.step, z_of(vector)))

    def _early(self, name: str, like: Vector) -> Any:
        """The z-loss at `PART` of the steps so far, or a little earlier; None if it was not known then.

        Nor is it known where ``like``, the sums of now, are elsewhere than those of then: that would be waited for.
        """
        past, wanted = self._past.get(name, []), PART * self.rec.step
        while len(past) > 1 and past[1][0] <= wanted:
            past.pop(0)
        if not past or past[0][0] > wanted:
            return None
        found = past[0][1]
        if isinstance(found, Tensor) and isinstance(like, Tensor):
            return found if found.device == like.device else None
        return None if isinstance(found, Tensor) or isinstance(like, Tensor) else found

    def _loads(self, names: list[str], loads: Any) -> None:
        """Record ``(expert, 2)`` loads of every router for which there is room."""
        kept: list[int] = []
        for i, name in enumerate(names):
            size = self._sizes.get(name)
            if size is None:
                room = LOADS - sum(self._sizes.values())
                size = self._sizes[name] = len(loads[i]) if len(loads[i]) <= room else 0
            if size == len(loads[i]):
                kept.append(i)
        if not kept:
            return
        places = self._tuple(f"{names[i]}[{e}]" for i in kept for e in range(len(loads[i])))
        if isinstance(loads, Tensor):
            joint: Any = (loads if len(kept) == len(names) else torch.stack([loads[i] for i in kept])).flatten(0, 1)
        else:
            joint = np.concatenate([loads[i] for i in kept])
        self.rec.emit_many("router_load", LOAD_STATS, places, joint)

    def _tuple(self, names: Iterable[str]) -> tuple[str, ...]:
        """The same tuple for the same names: the row remembers places by its identity."""
        made = tuple(names)
        return self._tuples.setdefault(made, made)

    def _experts(self) -> None:
        """Norms of the experts, and how alike they are."""
        for name, router in self.routers.items():
            parts = router.parts(self.rec.roots)
            why = spread(parts)
            if why is not None:
                self._spread = name, why
            if not parts or why is not None:
                continue
            found = norms(parts)
            if self._sizes.get(name) == len(found):
                self.rec.emit_many("expert", NORM_STATS, [f"{name}[{e}]" for e in range(len(found))], found)
            at = self._samples.get(name)
            if at is None or at[0].device != found.device:
                at = self._samples[name] = sample(parts)
            if any(len(i) for i in at):
                self.rec.emit("experts", ALIKE_STATS, name, alike(parts, at))

    def on_row(self) -> None:
        """Record what was seen; forget choices whose result was never trained on."""
        self._pending.clear()
        self._record()
        self._row.clear()
        if self.rec.step % EXPERTS_EVERY == 0:
            self._experts()

    def missing(self) -> Sequence[tuple[str, str]]:
        """Loads of experts beyond `LOADS`, and choices of which too little can be told. None without routers."""
        if self._without_gradients and not self.routers:
            return (("router_balance", _REENTRANT),)
        if self.rec.replicated and not self.routers:
            names = (name for r in self.rec.roots for name, m in r.named_modules() if m._parameters)
            return (("router_balance", REPLICAS),) if any(map(_NAME.search, names)) else ()
        found = [("router_balance.z", _NO_SCORES)] if self.routers and self._without_scores else []
        left = [name for name, size in self._sizes.items() if size == 0]
        if left:
            why = f"more than {LOADS:,} experts: loads of {left[0]} and {len(left) - 1} others are not"
            found.append(("router_load", why))
        if self._spread is not None:
            name, where = self._spread
            found += [
                (m, f"the experts of {name} are spread over {where}") for m in ("expert_norm", "expert_similarity")
            ]
        return found


def _stacked(early: list[Any], like: Tensor) -> Tensor | None:
    """``(router,)``, NaN where nothing is known; None if nothing at all is."""
    if all(z is None for z in early):
        return None
    nothing = like.new_full((), math.nan)
    return torch.stack([nothing if z is None else z for z in early])


def _runs(absent: frozenset[int]) -> Iterator[slice]:
    """The statistics that are not absent, as few slices."""
    begin = 0
    for i in (*sorted(absent), len(STATS)):
        if i > begin:
            yield slice(begin, i)
        begin = i + 1


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
