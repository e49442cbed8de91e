"""Attention: every training call of torch's fused attention, also inside `torch.nn.MultiheadAttention`, and by hand.

Attention written by hand is a softmax over products of queries and keys whose result is multiplied again. The first
half is read from the autograd graph when the softmax is called (`monitor.record.scores`), the second is waited for:
products are watched only between such a softmax and the product that uses it.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from monitor.record.mode import Watcher
from monitor.record.passes import attention
from monitor.record.passes.attention_together import MOST, Bound, Kept, Reader, read
from monitor.record.private import saved, saved_tensor_hooks_active
from monitor.record.scores import comes_from, find_scores
from monitor.record.site import REPLICAS, Site

#: Steps between two looks at the saved log-sum-exp, and at what needs rows of logits.
BOUND_EVERY, EVERY = 5, 10
#: Steps between two looks at all rows, which cost one more forward of the fused kernel.
ALL_EVERY = 100
#: About as many rows of a call are sampled, evenly spaced from a random start.
ROWS = 16
#: Parts of a projection's parameter names that an adapter around it adds.
_ADAPTER = re.compile(r"\.(?:lora_[AB]|base_layer)(?:\.[^.]+)?\.(?=(?:weight|bias)$)")
#: Most calls of one module in one forward that are recorded: a decoder that attends in a loop makes very many.
CALLS = 16
_HOPS, _NODES = 12, 256
#: Classes of modules that attend.
_NAMED = re.compile(r"(?i)att(entio)?n")


#: What was read of a call: the bound alone, everything, all but the bound, nor anything of the norms.
_BOUND, _ALL, _ROWS = (slice(0, 1),), (slice(0, None),), (slice(1, None),)
_LOGITS = (
    slice(1, attention.STATS.index("qk_bound")),
    slice(attention.STATS.index("k_norm") + 1, None),
)
_REENTRANT = "without gradients, as under reentrant activation checkpointing, where nothing can be told of it"
_NO_BOUND = (
    "the fused kernel's log-sum-exp cannot be read (dropout or values of another size on a CPU, or activation "
    "checkpointing): what was found is the largest logit of sampled rows"
)
_NO_NORMS = (
    "attention is written by hand, and its queries and keys cannot be read (activation checkpointing, or logits that "
    "are more than their product, scaled and masked)"
)
#: The ways to call softmax, and to multiply what it gives.
_SOFTMAX = (torch.softmax, torch.special.softmax, torch.Tensor.softmax, F.softmax)
_PRODUCTS = frozenset((
    torch.matmul, torch.bmm, torch.einsum, torch.Tensor.matmul, torch.Tensor.bmm, torch.Tensor.__matmul__,
))  # fmt: skip


@dataclass
class _Call:
    """One call of attention and what was read of it; or several that were read together, one after another."""

    modules: tuple[str, ...]
    heads: int
    at: tuple[slice, ...]
    values: Any


@dataclass
class _Written:
    """A softmax that may be one of attention: it is if its result is multiplied."""

    query: Any
    key: Any
    heads: int
    at: tuple[slice, ...]
    values: Any


class AttentionSite(Site):
    """Statistics per head of every attention whose result can be trained on, addressed ``module[head]``.

    The bound of the largest logit comes every fifth step from the log-sum-exp that the fused kernel has saved for
    backward; everything else every `EVERY` steps from rows, and every `ALL_EVERY` steps the entropy from all of them.
    Where no log-sum-exp can be read (dropout or values of another size on a CPU, a saved-tensor hook such as that of
    activation checkpointing), rows are all there is. Of attention written by hand the largest logit is that of all
    rows.
    """

    name = "attention"
    dense = True
    inside_every = BOUND_EVERY

    def __init__(self, recorder: Any) -> None:
        super().__init__(recorder)
        self._pending: list[_Call] = []
        self._held: dict[tuple[str, ...], _Call] = {}
        # on an accelerator calls are kept until their forward is over, and read together
        self._reader = Reader()
        self._size = 0
        self._samples: dict[int, range] = {}
        self._order: dict[str, int] = {}  # in which modules were called first
        self._epoch = -1
        self._calls: dict[str, int] = {}
        self._places: dict[str, str] = {}
        self._addresses: dict[tuple[tuple[str, ...], int], tuple[str, ...]] = {}
        self._written: dict[Any, _Written] = {}
        self._mine: frozenset[Any] = frozenset()
        self._watching = True
        self._left_out = ""
        self._seen = False
        self._why = ""
        self._without_gradients = False  # a softmax that may be attention's
        self._unbounded = False  # a call of the fused kernel whose log-sum-exp could not be read
        self._kinds: list[tuple[slice, ...]] = []  # what was read of the calls so far

    def after(self) -> dict[Any, Watcher]:
        """Watch the fused attention, the function that hides it in `torch.nn.MultiheadAttention`, and its parts."""
        return {
            F.scaled_dot_product_attention: self._fused,
            F.multi_head_attention_forward: self._multi_head,
            **dict.fromkeys(_SOFTMAX, self._softmax),
            **dict.fromkeys(_PRODUCTS, self._product),
        }

    # ---- what is seen

    def _fused(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if not self.due(BOUND_EVERY):
            return
        q, k, v = (_argument(args, kwargs, i, n) for i, n in enumerate(("query", "key", "value")))
        if not self._trained(result) or not isinstance(q, Tensor) or not isinstance(k, Tensor):
            return
        mask = _argument(args, kwargs, 3, "attn_mask")
        causal = bool(_argument(args, kwargs, 5, "is_causal"))
        name = self._place([x.grad_fn if isinstance(x, Tensor) else None for x in (q, k, v)])
        node = _first((result.grad_fn,), "ScaledDotProduct", hops=3)
        lse, scale = _log_sum_exp(node), kwargs.get("scale")
        if lse is not None and not _alone(q):
            # these are kept until the forward is over, by autograd too; under autocast q and k are not
            query, key = saved(node, "query"), saved(node, "key")
            if query is not None and key is not None and query.shape == q.shape and key.shape == k.shape:
                q, k = query, key
        self._read(name, q, k, lse, causal, mask, scale)

    def _multi_head(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        out = result[0] if isinstance(result, tuple) else result
        if not self.due(BOUND_EVERY) or not self._trained(out):
            return
        if saved_tensor_hooks_active():
            self._why = "inside nn.MultiheadAttention under activation checkpointing it cannot be read without running"
            return
        owner = _argument(args, kwargs, 11, "out_proj_weight")
        name = _above(self._known(owner), 2) if isinstance(owner, Tensor) else None
        heads = int(_argument(args, kwargs, 4, "num_heads"))
        node = _first((out.grad_fn,), "ScaledDotProduct", "Softmax", "SafeSoftmax")
        if node is None:
            return
        if type(node).__name__.startswith("ScaledDotProduct"):
            q, k = saved(node, "query"), saved(node, "key")
            causal = bool(getattr(node, "_saved_is_causal", False))
            if q is not None and k is not None:
                mask = saved(node, "attn_mask") if hasattr(node, "_saved_attn_mask") else None
                self._read(name, q, k, _log_sum_exp(node), causal, mask, getattr(node, "_saved_scale", None))
            return
        product = _first(tuple(n for n, _ in node.next_functions), "Bmm", "Baddbmm")
        names = ("batch1", "batch2") if type(product).__name__.startswith("Baddbmm") else ("self", "mat2")
        q, k = (saved(product, n) for n in names)  # already scaled
        if q is None or k is None or q.dim() != 3:
            return
        q, k = q.unflatten(0, (-1, heads)), k.transpose(1, 2).unflatten(0, (-1, heads))
        mask = _multi_head_mask(args, kwargs, q, k) if self.due(EVERY) else None
        self._read(name, q, k, None, False, mask, 1.0)

    def _softmax(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if not self.due(EVERY) or not self.rec.training or not isinstance(result, Tensor):
            return
        s, dim = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "dim")
        if type(s) is not Tensor or s.dim() not in (3, 4) or dim not in (-1, s.dim() - 1):
            return
        if result.grad_fn is None:
            self._without_gradients |= s.dim() == 4 and self.rec.inside_forward and not torch.is_grad_enabled()
            return
        if s.numel() == 0 or s.shape[-1] < 2 or not s.is_floating_point():
            return
        found = find_scores(s.grad_fn)
        if found is None:
            return
        s = s.detach()
        s = s if s.dim() == 4 else s.unsqueeze(1)
        batch, heads, queries, _ = s.shape
        norms = found.norms
        if norms is not None:
            q, k, scale = norms
            together = q.dim() == 3 and len(q) == batch * heads
            norms = (q.unflatten(0, (batch, heads)), k.unflatten(0, (batch, heads)), scale) if together else None
        alone = _alone(s)
        rows = self._sample(batch * queries, alone)
        values = attention.score_rows(s, rows, norms=norms) if alone else self._reader.scores(s, rows, norms)
        at = _ROWS if norms is not None else _LOGITS
        self._written[result.grad_fn] = _Written(found.query, found.key, heads, at, values)
        self._watch_products(True)

    def _product(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        given = [x for a in (*args, *kwargs.values()) for x in (a if isinstance(a, list | tuple) else (a,))]
        nodes = [x.grad_fn for x in given if isinstance(x, Tensor)]
        for i, node in enumerate(nodes):
            softmax = comes_from(node, self._written.keys())
            if softmax is not None:
                call = self._written.pop(softmax)
                module = self._numbered(self._place([call.query, call.key, *nodes[:i], *nodes[i + 1 :]]))
                if module is not None:
                    self._seen_call(module, call.heads, call.at, call.values)
        if not self._written:
            self._watch_products(False)

    def _watch_products(self, on: bool) -> None:
        """A watched call costs a few microseconds, and there are models of thousands of products."""
        if on == self._watching:
            return
        mode, self._watching = self.rec.mode, on
        if not self._mine:
            others = {f for site in self.rec.sites if site is not self for f in (*site.before(), *site.after())}
            self._mine = _PRODUCTS - others
        mode.watched = mode.watched | self._mine if on else mode.watched - self._mine

    def _trained(self, result: Any) -> bool:
        if not isinstance(result, Tensor) or not self.rec.training:
            return False
        if not result.requires_grad:
            self._why = "nothing before it is trained, or it is under reentrant activation checkpointing"
        return result.requires_grad

    def _read(
        self,
        name: str | None,
        q: Tensor,
        k: Tensor,
        lse: Tensor | None,
        causal: bool,
        mask: Tensor | None,
        scale: float | None,
    ) -> None:
        if q.is_nested or q.dim() not in (3, 4) or q.dim() != k.dim() or q.numel() == 0 or k.numel() == 0:
            self._why = f"its query has the shape {'of a nested tensor' if q.is_nested else tuple(q.shape)}"
            return
        batch, heads, queries = (q.shape[0], 1, q.shape[1]) if q.dim() == 3 else q.shape[:3]
        module = self._numbered(name)
        if module is None:
            return
        if lse is not None:
            # some kernels pad the rows, and cuDNN's has one more dimension; (batch, query, d) is one head
            lse = lse.squeeze(3) if lse.dim() == 4 else lse
            lse = (lse.unsqueeze(1) if lse.dim() == 2 else lse)[..., :queries]
            lse = lse if lse.shape == (batch, heads, queries) else None
        if self.due(EVERY):
            q, k, mask = q.detach(), k.detach(), None if mask is None else mask.detach()
            if q.dim() == 3:
                q, k = q.unsqueeze(1), k.unsqueeze(1)
                mask = mask.unsqueeze(1) if mask is not None and mask.dim() == 3 else mask
            k = k.expand(batch, -1, -1, -1)
            alone = _alone(q)
            at = self._sample(batch * queries, alone)
            how: dict[str, Any] = {"scale": scale, "causal": causal, "mask": mask, "lse": lse}
            whole = lse is not None and self.rec.step % ALL_EVERY == 0 and _exact(q, k, mask)
            if alone:
                values: Any = attention.attention_rows(q, k, at, **how)
                if whole:
                    values[:, attention.OF_ROWS] = attention.all_rows(q, k, **how)
            else:
                values = self._reader.fused(q, k, at, **how, whole=whole)
            self._unbounded |= lse is None
            self._seen_call(module, heads, _ALL if lse is not None else _ROWS, values)
        elif lse is not None:
            bound = attention.lse_max(lse)[:, None] if _alone(lse) else Bound(lse)
            self._seen_call(module, heads, _BOUND, bound)

    def _seen_call(self, module: str, heads: int, at: tuple[slice, ...], values: Any) -> None:
        self._pending.append(_Call((module,), heads, at, values))
        if isinstance(values, Kept):
            self._order.setdefault(module, len(self._order))
            self._size += values.held
            if self._size > MOST:
                self._settle()

    def _settle(self) -> None:
        """Read the calls that were only kept so far: those that are alike together."""
        alike: dict[Hashable, list[_Call]] = {}
        for call in self._pending:
            if isinstance(call.values, Kept):
                alike.setdefault((type(call.values), call.values.kind), []).append(call)
        if alike:
            self._pending = [c for c in self._pending if not isinstance(c.values, Kept)]
            for calls in alike.values():
                modules = tuple(m for c in calls for m in c.modules)
                self._pending.append(_Call(modules, calls[0].heads, calls[0].at, read([c.values for c in calls])))
        self._reader, self._size = Reader(), 0
        self._samples.clear()

    def _sample(self, rows: int, alone: bool) -> range:
        """Rows of so many, evenly spaced; the same for all calls of a forward unless each is read alone."""
        known = None if alone else self._samples.get(rows)
        if known is None:
            stride = max(1, rows // ROWS) | 1  # odd: over a length that is a power of two every position is met
            known = range(self.rec.random.randrange(min(stride, rows)), rows, stride)
            if not alone:
                self._samples[rows] = known
        return known

    # ---- where it is

    def _known(self, p: Tensor) -> str:
        name = self.rec.parameter(p)
        return "" if name.startswith("parameter[") else _ADAPTER.sub(".", name)

    def _numbered(self, name: str | None) -> str | None:
        """The module's name; a module that calls several times in a forward gets numbers from its second call on.

        None for the calls beyond `CALLS`.
        """
        number = self._calls[name or ""] = self._calls.get(name or "", 0) + 1
        if number > CALLS:
            self._left_out = name or "attention"
            return None
        return f"{name or 'attention'}:{number}" if number > 1 or name is None else name or "attention"

    def _place(self, nodes: Sequence[Any]) -> str | None:
        """The module that calls, from the parameters that query, key and value were made with; None if there are none.

        Query, key and value projections share it; of three pairs the closest relatives are believed, since in front of
        a frozen projection the next parameter is one of another layer.
        """
        first = self._nearest(nodes[0])
        place = self._places.get(first) if first else None
        if place is None:
            known = [name for name in (first, *map(self._nearest, nodes[1:])) if name]
            if not known:
                return None
            pairs = [(a, b) for i, a in enumerate(known) for b in known[i + 1 :]] or [(known[0], known[0])]
            place = max((_common(a, b) for a, b in pairs), key=lambda p: p.count(".") + bool(p))
            self._places[first] = place
        return place

    def _nearest(self, node: Any) -> str:
        """Name of the parameter nearest to ``node`` in its graph, gains of a norm left out; empty if none is near."""
        for n in _below((node,), _NODES):
            variable = getattr(n, "variable", None)
            if variable is None:
                continue
            name = self._known(variable)
            # queries and keys may share a norm, which is not where attention is
            if name and (variable.dim() > 1 or name.rpartition(".")[2] == "bias"):
                return name
        return ""

    # ---- rows

    def on_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count the calls of each module anew."""
        self._calls.clear()

    def on_output(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Read what was kept while the forward ran."""
        self._settle()

    def on_backward(self) -> None:
        """Keep what was seen since the last backward: it is being trained on."""
        self._settle()
        if self._epoch != self.rec.epoch:
            self._held.clear()
            self._epoch = self.rec.epoch
        for call in self._pending:
            self._hold(call)
        self._forget()

    def _hold(self, call: _Call) -> None:
        """Join a call with that of the same modules in an earlier micro-batch."""
        before = self._held.get(call.modules)
        if before is None and isinstance(call.values, Tensor):
            others = [c for c in self._held.values() if not set(call.modules).isdisjoint(c.modules)]
            if others:  # calls that were read together then are not quite those of now
                for c in others:
                    del self._held[c.modules]
                    self._held |= {single.modules: single for single in _singles(c)}
                for single in _singles(call):
                    self._hold(single)
                return
        if before is not None and (before.at, before.heads) == (call.at, call.heads):
            join = attention.merge if call.at != _BOUND else _larger
            call.values = join(before.values, call.values)
        self._held[call.modules] = call

    def on_row(self) -> None:
        """Write what was trained on; forget the rest."""
        for kind in (_BOUND, _ALL, _ROWS, _LOGITS):
            of_kind = [c for c in self._held.values() if c.at == kind]
            if of_kind and kind not in self._kinds:
                self._kinds.append(kind)
            for there in (False, True):  # a model may have some of its layers on a CPU
                calls = [c for c in of_kind if isinstance(c.values, Tensor) == there]
                if calls:
                    self._write(calls)
        self._held.clear()
        self._forget()

    def _write(self, calls: Sequence[_Call]) -> None:
        """Write calls of one kind, whose values are all on a CPU or all on accelerators."""
        self._seen = True
        if len(calls) > 1 and isinstance(calls[0].values, Tensor):
            calls = sorted((c for call in calls for c in _singles(call)), key=lambda c: self._order[c.modules[0]])
            modules = tuple(a for c in calls for a in self._address(c))
            values = torch.cat([c.values.to(self.rec.device) for c in calls])
        elif len(calls) > 1:
            modules = tuple(a for c in calls for a in self._address(c))
            values = attention.np.concatenate([c.values for c in calls])
        else:
            modules, values = self._address(calls[0]), calls[0].values
        for at in calls[0].at:
            self.rec.emit_many("attention", attention.STATS, modules, values[:, at], at)

    def _forget(self) -> None:
        self._pending.clear()
        self._calls.clear()
        self._written.clear()
        self._reader, self._size = Reader(), 0
        self._samples.clear()
        self._watch_products(False)

    def _address(self, call: _Call) -> tuple[str, ...]:
        key = (call.modules, call.heads)
        if key not in self._addresses:
            self._addresses[key] = tuple(f"{m}[{h}]" for m in call.modules for h in range(call.heads))
        return self._addresses[key]

    def missing(self) -> Sequence[tuple[str, str]]:
        """Attention, if a call of it was seen that could not be read; a model without any lacks nothing."""
        if not self._seen:
            if self.rec.replicated and any(
                _NAMED.search(type(m).__name__) for r in self.rec.roots for m in r.modules()
            ):
                return (("attn_logit_max", REPLICAS),)
            if self._why:
                return (("attn_logit_max", f"attention was seen, but {self._why}"),)
            if self._without_gradients:
                return (("attn_logit_max", f"a softmax that may be attention's ran {_REENTRANT}"),)
            return ()
        found = []
        if self._left_out:
            found.append(("attn_logit_max", f"of the calls of {self._left_out} in one forward only {CALLS} are read"))
        if self._unbounded and _ALL not in self._kinds:
            found.append(("attn_logit_max.lse_max", _NO_BOUND))
        if self._kinds == [_LOGITS]:
            found.append(("qk_norm_bound", _NO_NORMS))
        return found


def _alone(t: Tensor) -> bool:
    """True on a CPU, where a call is read when it is made."""
    return t.is_cpu


def _singles(call: _Call) -> list[_Call]:
    """The calls that were read together, each of its own."""
    parts = call.values.split(call.heads)
    return [_Call((m,), call.heads, call.at, x) for m, x in zip(call.modules, parts, strict=True)]


def _larger(a: Any, b: Any) -> Any:
    return torch.maximum(a, b) if isinstance(a, Tensor) else attention.np.maximum(a, b)


def _exact(q: Tensor, k: Tensor, mask: Tensor | None) -> bool:
    """True if the entropy of all rows can be had: in 16 bits its parts are too coarse, and an added mask enters it."""
    wide = q.dtype == k.dtype and q.dtype in (torch.float32, torch.float64)
    return wide and not torch.is_autocast_enabled(q.device.type) and (mask is None or mask.dtype == torch.bool)


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], at: int, name: str) -> Any:
    return args[at] if len(args) > at else kwargs.get(name)


def _log_sum_exp(node: Any) -> Tensor | None:
    """What a fused attention node has saved, under the name its kernel gives it."""
    if node is None:
        return None
    found = saved(node, "logsumexp")
    return found if found is not None else saved(node, "log_sumexp")


def _below(nodes: tuple[Any, ...], most: int) -> Iterable[Any]:
    """Up to ``most`` nodes of the graph, nearest first; of a linear layer the weight before the input."""
    todo, seen = deque(n for n in nodes if n is not None), set()
    while todo and len(seen) < most:
        node = todo.popleft()
        if node not in seen:
            seen.add(node)
            yield node
            todo.extend(n for n, _ in reversed(node.next_functions) if n is not None)


def _first(nodes: tuple[Any, ...], *kinds: str, hops: int = _HOPS) -> Any:
    """The nearest node, at most ``hops`` away, whose kind begins with one of ``kinds``."""
    layer, seen = [n for n in nodes if n is not None], set()
    for _ in range(hops):
        for node in layer:
            if type(node).__name__.startswith(kinds):
                return node
        seen.update(layer)
        layer = [n for node in layer for n, _ in node.next_functions if n is not None and n not in seen]
    return None


def _above(name: str, levels: int) -> str | None:
    """The module so many levels above a parameter's name; None without a name."""
    return ".".join(name.split(".")[:-levels]) if name else None


def _common(a: str, b: str) -> str:
    """The innermost module that holds both parameters and is no projection."""
    if a.rpartition(".")[0] == b.rpartition(".")[0]:
        # a projection's own parameters are called so; an attention that holds its weights itself names them otherwise
        own = a.rpartition(".")[2] in ("weight", "bias") and b.rpartition(".")[2] in ("weight", "bias")
        return _above(a, 2 if own else 1) or ""
    shared = []
    for x, y in zip(a.split("."), b.split("."), strict=False):
        if x != y:
            break
        shared.append(x)
    return ".".join(shared)


def _multi_head_mask(args: tuple[Any, ...], kwargs: dict[str, Any], q: Tensor, k: Tensor) -> Tensor | None:
    """The mask of a call of `multi_head_attention_forward`, added to ``(batch, head, query, key)``."""
    padding = _argument(args, kwargs, 14, "key_padding_mask")
    mask = _argument(args, kwargs, 16, "attn_mask")
    total = None
    if isinstance(mask, Tensor):
        total = _added(mask)
        total = total.unflatten(0, (-1, q.shape[1])) if total.dim() == 3 else total
    if isinstance(padding, Tensor):
        padding = _added(padding)[..., None, None, :]
        total = padding if total is None else total + padding
    if total is not None and total.shape[-1] < k.shape[2]:  # bias_k and add_zero_attn add keys that all see
        total = F.pad(total, (0, k.shape[2] - total.shape[-1]))
    return total


def _added(mask: Tensor) -> Tensor:
    """A mask with True, or a number to add, for keys that are not seen, as numbers to add."""
    mask = mask.detach()
    return (
        torch.zeros(mask.shape, device=mask.device).masked_fill_(mask, float("-inf"))
        if mask.dtype == torch.bool
        else mask
    )
