"""The calls that lead from a batch to its loss, so that the same loss can be computed again.

A training step computes its loss somewhere between the first call of a root module and `backward`. The function mode
sees every torch function called there, and hooks see the root modules; played again in the same order with the same
random numbers, on whatever parameters the modules hold then, they give the loss as a function of the parameters.
Nothing is known about the user's loss function, and nothing has to be. What the calls do not tell (a number that was
read from a tensor and changed in Python, say) shows in the gradient: a replay is trusted only if its gradient is the
run's.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from monitor.curvature.environment import RandomState
from monitor.record.facts import unwrap
from monitor.record.held import Held, held

#: How deep tensors are looked for in objects of the user's own classes.
_DEPTH = 3

Call = tuple[tuple[Any, ...], dict[str, Any], Any]


@dataclass(frozen=True)
class _Made:
    """A tensor that an earlier call gave: the ``leaf``-th of call ``call``."""

    call: int
    leaf: int


@dataclass(frozen=True)
class _Root:
    """A root module, called again; a tape that is kept must not keep a model that its user has dropped."""

    module: weakref.ref[nn.Module]
    dtypes: Sequence[torch.dtype]  # of what it gave, or its wrapper

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _alive(self.module)(*args, **kwargs)


@dataclass(frozen=True)
class _Call:
    """One call; tensors in ``args`` and ``kwargs`` that stem from the tape are replaced by where they come from.

    Attributes:
        autocast: device types for which autocast was on, with their dtypes.
        changes: True if it changes a tensor in place.
        severed: True if something it is given depends on parameters and does not stem from the tape.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    grad: bool
    autocast: Mapping[str, torch.dtype]
    changes: bool
    severed: bool


class Tape:
    """The calls from the first root forward of a micro-batch to its `backward`.

    Args:
        models: root modules, unwrapped.
        random: the states of all random-number generators before the first forward.

    Attributes:
        loss: what `backward` was called on, read when it was called; None until then, and on an accelerator.
        kinds: device types that calls may be made under autocast for.
        severed: a replay takes something for data that depends on parameters, and the loss on it: what gave it was not
            seen, as in a `torch.autograd.Function`, a compiled function, or a model that is not followed.
    """

    def __init__(self, models: Sequence[nn.Module], random: RandomState) -> None:
        self.random = random
        self.loss: float | None = None
        self.severed = False
        kinds = dict.fromkeys(["cpu", *(p.device.type for m in models for p in m.parameters())])
        self.kinds = [kind for kind in kinds if torch.amp.is_autocast_available(kind)]
        self._entered: Mapping[str, torch.dtype] = {}
        self._calls: list[_Call] = []
        self._cut = False  # in what is being traced
        self._where: dict[int, _Made] = {}
        self._alive: list[Tensor] = []  # an id means nothing once its tensor is gone
        self._end: _Made | None = None
        self._gradient: Any = None
        self._held = {id(p): place for p, place in held(models)}

    @property
    def complete(self) -> bool:
        """True once `backward` was called on something that these calls gave."""
        return self._end is not None

    def enter(self) -> None:
        """A root module is being called, maybe by its wrapper, which may turn autocast on: the last time counts."""
        self._entered = self._autocast()

    def root(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A root module was called."""
        again = _Root(weakref.ref(unwrap(module)), [t.dtype for t in _tensors(output)])
        self._note(again, args, kwargs, output, True, False, self._entered)

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """A torch function was called outside the root modules."""
        if any(isinstance(x, torch.Generator) for x in (*args, *kwargs.values())):
            for t in _tensors(result):  # drawn from a generator of the user's, which is not to move on: data
                self._where.pop(id(t), None)
            return
        name = getattr(func, "__name__", "")
        changes = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        if changes or any(True for _ in _tensors(result)):
            self._note(func, args, kwargs, result, torch.is_grad_enabled(), changes, self._autocast())

    def _autocast(self) -> Mapping[str, torch.dtype]:
        return {kind: torch.get_autocast_dtype(kind) for kind in self.kinds if torch.is_autocast_enabled(kind)}

    def _note(
        self,
        func: Callable[..., Any],
        args: Any,
        kwargs: Any,
        result: Any,
        grad: bool,
        changes: bool,
        autocast: Mapping[str, torch.dtype],
    ) -> None:
        self._cut = False
        args, kwargs = self._traced(args), self._traced(dict(kwargs))
        self._calls.append(_Call(func, args, kwargs, grad, autocast, changes, self._cut))
        for i, t in enumerate(_tensors(result)):
            self._where[id(t)] = _Made(len(self._calls) - 1, i)
            self._alive.append(t)

    def end(self, loss: Tensor, gradient: Tensor | None) -> None:
        """`backward` is being called on ``loss`` with ``gradient``."""
        end = self._trace(loss)
        self._end = end if isinstance(end, _Made) else None
        self.severed = self._end is not None and any(c.severed for c in self._behind(self._end.call))
        self._gradient = None if gradient is None else gradient.detach().clone()
        self.loss = float(loss.detach()) if loss.is_cpu and loss.numel() == 1 else None

    def twin(self) -> Tape:
        """The same calls, for another loss among what they gave, on which `backward` is called next."""
        twin = object.__new__(Tape)
        twin.__dict__ = dict(self.__dict__)
        return twin

    def close(self) -> None:
        """No `backward` follows any more: let go of what the calls gave."""
        self._where, self._alive = {}, []

    def _behind(self, last: int) -> list[_Call]:
        """The calls on whose results the ``last`` one depends, with it; every one that changes something may be one."""
        todo, found = [last, *(i for i, c in enumerate(self._calls) if c.changes)], dict[int, _Call]()
        while todo:
            i = todo.pop()
            if i not in found:
                found[i] = c = self._calls[i]
                todo += [x.call for x in tree_leaves((c.args, c.kwargs)) if isinstance(x, _Made)]
        return list(found.values())

    def replay(self, *, autocast: bool = False) -> Tensor:
        """The loss again: the tensor that `backward` was called on, as a function of what the modules hold now.

        Random numbers are drawn as they were; the caller puts the generators back. Call it where nothing the modules
        change (buffers, counters) matters, as in `LossClosure.session` or `Moment.evaluation`.

        Args:
            autocast: turn it on for the calls for which it was on, and give what they gave in its dtype.

        Returns:
            ``()``, differentiable if gradients are enabled; the sum over elements times `backward`'s own gradient if it
            was called with one.
        """
        if self._end is None:
            raise RuntimeError("the loss does not stem from the calls on this tape")
        self.random.restore()
        made: list[list[Tensor]] = []
        enabled = torch.is_grad_enabled()
        with _Undrawn():
            for c in self._calls:
                with _autocast(c.autocast if autocast else {}), torch.set_grad_enabled(c.grad and enabled):
                    gave = list(_tensors(c.func(*_filled(c.args, made), **_filled(dict(c.kwargs), made))))
                    if autocast and isinstance(c.func, _Root):  # a wrapper may have widened it
                        gave = [t.to(dtype) for t, dtype in zip(gave, c.func.dtypes, strict=True)]
                    made.append(gave)
        loss = made[self._end.call][self._end.leaf]
        return loss.reshape(()) if self._gradient is None else (loss * self._gradient).sum()

    def calls(self, func: Callable[..., Any]) -> list[Call]:
        """Replay, and give every call of ``func``, also inside the modules, as ``(args, kwargs, result)``."""
        with _Catch(func) as caught:
            self.replay()
        return caught.calls

    def copy(self, dtype: torch.dtype | None = None) -> Tape:
        """The same calls on data of their own, whatever becomes of the batch; in another precision if given."""
        twin = self.twin()
        twin.close()
        data: dict[int, Tensor] = {}

        def own(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            if id(x) not in data:
                wide = dtype if x.is_floating_point() else None
                data[id(x)] = x.detach().to(wide, copy=True) if wide else x.detach().clone()
            return data[id(x)]

        twin._calls = [
            dataclasses.replace(c, args=tree_map(own, c.args), kwargs=tree_map(own, c.kwargs)) for c in self._calls
        ]
        return twin

    @property
    def nbytes(self) -> int:
        """Memory of the data on the tape, each tensor once."""
        held = {id(t): t for c in self._calls for t in tree_leaves((c.args, c.kwargs)) if isinstance(t, Tensor)}
        return sum(t.numel() * t.element_size() for t in held.values())

    @property
    def inputs(self) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """Positional and keyword arguments of the first call of a root module."""
        return self._calls[0].args, self._calls[0].kwargs

    def _traced(self, given: Any) -> Any:
        return tree_map(self._trace, given)

    def _trace(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        made = self._where.get(id(x))
        if x.grad_fn is not None and (made is None or not self._calls[made.call].grad):
            self._cut = True  # of a torch.autograd.Function at most the inside is seen
            return x
        known = made or self._held.get(id(x))
        return x if known is None else known


@contextmanager
def _autocast(dtypes: Mapping[str, torch.dtype]) -> Iterator[None]:
    with ExitStack() as stack:
        for kind, narrow in dtypes.items():
            stack.enter_context(torch.autocast(kind, narrow, cache_enabled=False))
        yield


def _alive(module: weakref.ref[nn.Module]) -> nn.Module:
    found = module()
    if found is None:
        raise RuntimeError("the model on this tape is gone")
    return found


def _filled(given: Any, made: list[list[Tensor]]) -> Any:
    def fill(x: Any) -> Any:
        if isinstance(x, _Made):
            return made[x.call][x.leaf]
        if isinstance(x, Held):
            return _alive(x.module)._parameters[x.key]
        return x

    return tree_map(fill, given)


def _tensors(value: Any, depth: int = _DEPTH) -> Iterator[Tensor]:
    """Tensors in a result, in an order that depends on its structure alone; also in objects of unknown classes."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif depth and hasattr(leaf, "__dict__") and not isinstance(leaf, nn.Module | type):
            yield from _tensors(list(vars(leaf).values()), depth - 1)


class _Undrawn(TorchFunctionMode):
    """Puts back the generators of the user's own that are drawn from in here."""

    def __init__(self) -> None:
        super().__init__()
        self._before: dict[int, tuple[torch.Generator, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in (*args, *(kwargs or {}).values()):
            if isinstance(x, torch.Generator) and id(x) not in self._before:
                self._before[id(x)] = x, x.get_state()
        return func(*args, **(kwargs or {}))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for generator, state in self._before.values():
            generator.set_state(state)


class _Catch(TorchFunctionMode):
    def __init__(self, func: Callable[..., Any]) -> None:
        super().__init__()
        self.func = func
        self.calls: list[Call] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is self.func:
            self.calls.append((args, kwargs or {}, result))
        return result
