"""Units behind activation functions: which never answer, which hardly do, and which lie at an end of their range.

Every call of an activation function inside a root's training forward is seen through the function mode, whether a
module such as `torch.nn.ReLU` makes it or a line of the model's own forward, in place or not.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from monitor.record.facts import unwrap
from monitor.record.mode import Watcher
from monitor.record.passes.units import KNOWN, OF_UNITS, STATS, UnitSizes, unit_sizes, unit_stats
from monitor.record.sites._backward import BACKWARD, losses
from monitor.record.sites._modules import ForwardSite, alike, emit_rows, local_tensor, named

#: Calls of one module in one forward, and calls altogether, that are recorded.
CALLS, MOST = 32, 256
#: Nodes of the graph between an activation function and the product whose result it is given.
_NODES = 24
#: What a call is for, as the statistic ``role`` says it.
HIDDEN, OUTPUT, GATE = 0.0, 1.0, 2.0

_TANH = (torch.tanh, torch.tanh_, Tensor.tanh, Tensor.tanh_, F.tanh)
_SIGMOID = (torch.sigmoid, torch.sigmoid_, Tensor.sigmoid, Tensor.sigmoid_, F.sigmoid, torch.special.expit)
_UNBOUNDED = (
    F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu6, F.leaky_relu, F.leaky_relu_, F.elu,
    F.elu_, F.celu, F.celu_, F.selu, F.selu_, torch.selu, torch.celu, F.gelu, F.silu, F.mish, F.hardswish, F.softplus,
    F.softsign, F.prelu, torch.prelu, Tensor.prelu, F.rrelu, F.rrelu_, F.glu, F.threshold,
)  # fmt: skip

#: Nodes of products by which the units of one layer become those of the next, by what their units lie along.
_LINEAR = ("Addmm", "Mm", "Bmm", "Baddbmm", "Addbmm", "Linear", "Mv", "Addmv", "NativeLayerNorm", "Embedding")
_CONVOLUTION = (
    "Convolution",
    "NativeBatchNorm",
    "CudnnBatchNorm",
    "MiopenBatchNorm",
    "SyncBatchNorm",
    "NativeGroupNorm",
)
_PRODUCTS = (*_LINEAR[:7], "Convolution", "ScaledDotProduct")

_NO_GRADIENT = (
    "nothing before an activation function is trained, or it is under reentrant activation checkpointing: such calls "
    "are left out"
)


@dataclass
class _Call:
    """One call and what was read of it; its place in the graph is known until its loss is."""

    name: str
    root: int  # id of the module whose forward it is in
    node: Any
    sizes: UnitSizes
    output: bool = False  # it has met no product when its root returns it


class UnitsSite(ForwardSite):
    """How active the units behind every activation function are, every hundredth step and at a few early ones."""

    name, metric = "units", "dormant_units"
    inside_every = every = 100
    early = (3, 10, 25, 50)
    most = 1 << 12  # its hooks do no more than say which module is being called

    def __init__(self, recorder: Any) -> None:
        super().__init__(recorder)
        self._inside: list[str] = []  # names of the modules whose calls are under way
        self._calls: list[_Call] = []
        self._root = 0
        self._numbers: dict[str, int] = {}
        self._roles: dict[str, float] = {}
        self._before: dict[str, Tensor] = {}
        self._mine: frozenset[Any] | None = None
        self._without_gradients = False
        self._beyond = False

    # ---- what is seen

    def before(self) -> dict[Any, Watcher]:
        """See what backward is called on."""
        return dict.fromkeys(BACKWARD, self._backward)

    def after(self) -> dict[Any, Watcher]:
        """Watch every activation function."""
        watched: dict[Any, Watcher] = {f: partial(self._called, f, None) for f in _UNBOUNDED}
        watched |= {f: partial(self._called, f, (-1.0, 1.0)) for f in _TANH}
        watched |= {f: partial(self._called, f, (0.0, 1.0)) for f in (*_SIGMOID, F.hardsigmoid)}
        return watched | {f: partial(self._hardtanh, f) for f in (F.hardtanh, F.hardtanh_)}

    def choose(self, root: nn.Module, prefix: str) -> Iterable[tuple[nn.Module, str]]:
        """All modules but the root itself, whose call is under way."""
        return [
            (m, name) for name, m in named(root, prefix) if m is not root and not isinstance(m, torch.jit.ScriptModule)
        ]

    def hook(self, module: nn.Module, name: str) -> Iterable[RemovableHandle]:
        """Say that a call of the module begins, and that it ends."""
        begins, ends = partial(self._begins, name), partial(self._ends, name)
        return module.register_forward_pre_hook(begins), module.register_forward_hook(ends)

    def _begins(self, name: str, module: nn.Module, args: Any) -> None:
        if threading.get_ident() == self._thread:
            self._inside.append(name)

    def _ends(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == self._thread:
            while self._inside and self._inside.pop() != name:  # calls within it that an exception has ended
                pass

    def on_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin to watch."""
        super().on_forward(module, args, kwargs)
        self._root = id(module)
        # of forwards that nobody has trained on yet the graph of the last one is kept alive, and no other
        self._calls = [call for call in self._calls if call.root != self._root]
        self._inside.clear()
        self._numbers.clear()
        self._watch(self._armed)

    def on_output(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """See which calls gave what the root returns: the layer of its output."""
        if self._armed and self._calls and unwrap(module) in self.rec.roots:
            nodes = {call.node for call in self._calls}
            last = _met(_nodes(output), nodes)
            for call in self._calls:
                call.output |= call.node in last
        super().on_output(module, args, kwargs, output)
        self._watch(False)

    def _watch(self, on: bool) -> None:
        """Outside the forwards it looks into, nobody is asked whether these calls matter."""
        mode = self.rec.mode
        if self._mine is None:
            others = {f for s in self.rec.sites if s is not self for f in (*s.before(), *s.after())}
            self._mine = frozenset(self.after()) - others
        mode.watched = mode.watched | self._mine if on else mode.watched - self._mine

    def _hardtanh(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        low = float(args[1] if len(args) > 1 else kwargs.get("min_val", -1.0))
        high = float(args[2] if len(args) > 2 else kwargs.get("max_val", 1.0))
        # that of `torch.nn.ReLU6`, whose units at the lower end are 0
        self._called(func, None if low == 0 else (low, high), args, kwargs, result)

    def _called(
        self,
        func: Any,
        bounds: tuple[float, float] | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
    ) -> None:
        if not self._armed or not self.rec.inside_forward or not isinstance(result, Tensor):
            return
        node, x = result.grad_fn, local_tensor((result,))
        if node is None:
            self._without_gradients = True
            return
        if x is None or x.dim() < 2:
            return
        name = (self._inside[-1] if self._inside else "") or func.__name__.strip("_")
        number = self._numbers[name] = self._numbers.get(name, 0) + 1
        if number > CALLS or len(self._calls) >= MOST:
            self._beyond = True
            return
        sizes = unit_sizes(x, _axis(x, node), bounds)
        self._calls.append(_Call(f"{name}:{number}" if number > 1 else name, self._root, node, sizes))

    # ---- what is recorded

    def record(self) -> None:
        """Which calls are trained on is seen from what backward is called on."""

    def _backward(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if not self._calls:
            return
        graph = _Graph([x.grad_fn for x in losses(args, kwargs)])
        trained = [call for call in self._calls if call.node in graph]
        self._calls = [call for call in self._calls if call.node not in graph]
        for call in trained:
            if call.name not in self._roles:
                self._roles[call.name] = OUTPUT if call.output else graph.role(call.node)
        self._emit(trained)

    def _emit(self, calls: Sequence[_Call]) -> None:
        by_name = {call.name: call.sizes for call in calls}
        rows: dict[str, Tensor] = {}
        for names in alike({name: sizes.kind for name, sizes in by_name.items()}):
            before = [self._before.get(name) for name in names]
            like = by_name[names[0]].sizes
            before = [b if b is not None and (b.shape, b.device) == (like.shape, like.device) else None for b in before]
            stats, dormant = unit_stats([by_name[name] for name in names], before)
            rows |= zip(names, stats, strict=True)
            self._before |= zip(names, dormant, strict=True)
        bounded = [name for name, sizes in by_name.items() if sizes.near is not None]
        last = OF_UNITS.stop
        emit_rows(self.rec, "units", STATS, {n: rows[n][: last - 1] for n in by_name}, slice(0, last - 1))
        emit_rows(self.rec, "units", STATS, {n: rows[n][last - 1 :] for n in bounded}, slice(last - 1, last))
        known = {n: (float(s.sizes.numel()), float(s.rows), self._roles[n]) for n, s in by_name.items()}
        emit_rows(self.rec, "units", STATS, {n: np.array(values) for n, values in known.items()}, KNOWN)

    def forget(self) -> None:
        """Drop what was never trained on, and the graph it was in."""
        self._calls.clear()
        self._inside.clear()
        self._watch(False)

    def missing(self) -> Sequence[tuple[str, str]]:
        """What a compiled region hides, what has no gradient, and calls beyond `CALLS` and `MOST`."""
        found = list(super().missing())
        if self._without_gradients:
            found.append((self.metric, _NO_GRADIENT))
        if self._beyond:
            why = f"of so many calls the first {CALLS} of each module are recorded, and {MOST} altogether"
            found.append((self.metric, why))
        return found


class _Graph:
    """The graph below some losses, and of each node those that it is an input of."""

    def __init__(self, roots: Iterable[Any]) -> None:
        self._above: dict[Any, list[Any]] = {}
        todo = [r for r in roots if r is not None]
        self._above |= {r: [] for r in todo}
        while todo:
            node = todo.pop()
            for n, _ in node.next_functions:
                if n is None:
                    continue
                if n not in self._above:
                    self._above[n] = []
                    todo.append(n)
                self._above[n].append(node)

    def __contains__(self, node: Any) -> bool:
        return node in self._above

    def role(self, node: Any) -> float:
        """`HIDDEN` if a product takes it on its way to the loss, `GATE` if it is first multiplied by something else."""
        todo, seen, gate = [node], {node}, False
        while todo:
            for n in self._above[todo.pop()]:
                if n in seen:
                    continue
                seen.add(n)
                if _is(n, _PRODUCTS):
                    return HIDDEN
                if _is(n, ("Mul",)) and sum(1 for m, _ in n.next_functions if m is not None) > 1:
                    gate = True
                else:
                    todo.append(n)
        return GATE if gate else OUTPUT


def _met(roots: Iterable[Any], wanted: set[Any]) -> set[Any]:
    """Those of ``wanted`` that are met on the way down from ``roots`` before any product."""
    todo = list(roots)
    seen = set(todo)
    while todo:
        node = todo.pop()
        if not _is(node, _PRODUCTS):
            below = [n for n, _ in node.next_functions if n is not None and n not in seen]
            seen.update(below)
            todo += below
    return seen & wanted


def _axis(x: Tensor, node: Any) -> int:
    """The dimension of units: 1 behind a convolution, the last behind a product with a matrix."""
    if x.dim() == 2:
        return 1
    todo, seen = [node], 0
    while todo and seen < _NODES:
        node = todo.pop(0)
        seen += 1
        if _is(node, _CONVOLUTION):
            return 1
        if _is(node, _LINEAR):
            return x.dim() - 1
        todo += [n for n, _ in node.next_functions if n is not None]
    return 1 if x.dim() > 3 else x.dim() - 1


def _is(node: Any, names: tuple[str, ...]) -> bool:
    return type(node).__name__.startswith(names)


def _nodes(output: Any) -> list[Any]:
    """The nodes of the tensors in what a module returns."""
    found, todo = [], [output]
    while todo:
        x = todo.pop()
        if isinstance(x, Tensor):
            found += [x.grad_fn] if x.grad_fn is not None else []
        elif isinstance(x, dict):
            todo += x.values()
        elif isinstance(x, list | tuple):
            todo += x
    return found
