"""The private corners of torch that the recorder relies on, in one place. A test calls each of them."""

from __future__ import annotations

import contextlib
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as _calls
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.hooks import RemovableHandle

_C: Any = torch._C


def captures(device: torch.device) -> Callable[[], bool] | None:
    """What tells whether operations on ``device`` are being made into a graph, to be played again; None on a CPU."""
    module = None if device.type == "cpu" else torch.get_device_module(device)
    return getattr(module, "is_current_stream_capturing", None)


def saved_tensor_hooks_active() -> bool:
    """True inside `save_on_cpu`, non-reentrant checkpointing and the like: reading a saved tensor would run a hook."""
    return _C._autograd._top_saved_tensors_default_hooks(False) is not None


def transformed() -> bool:
    """True where tensors stand for something else: under `torch.func`, and in `torch.jit.trace`, which keeps ours."""
    return _C._functorch.peek_interpreter_stack() is not None or _C._is_tracing()


def compiled_any() -> bool:
    """True once Dynamo has compiled something in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo is not None and dynamo.counters["frames"]["total"] > 0


def compiles() -> bool:
    """True once `torch.compile` was asked for in this process: something may be compiled at any moment."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return dynamo is not None and any(backend is not None for backend in dynamo.cached_backends.values())


class Compiling:
    """Calls ``tell`` before Dynamo compiles anything, or traces for an export: that resets it, which drops this.

    Args:
        tell: called with nothing, on the thread that compiles.
    """

    def __init__(self, tell: Callable[[], None]) -> None:
        self._tell = tell

    def __call__(self, *args: Any) -> None:
        """Dynamo begins."""
        self._tell()

    def __del__(self) -> None:
        self._tell()


def before_compiling(tell: Callable[[], None]) -> Callable[[], Compiling | None] | None:
    """Have ``tell`` called before something is compiled or exported; None where that cannot be known.

    Returns:
        What gives the `Compiling` for as long as it is heard.
    """
    handler = getattr(sys.modules.get("torch._dynamo"), "callback_handler", None)
    if handler is None:
        return None
    return weakref.ref(handler.register_start_callback(Compiling(tell)))


def stop_hearing(compiling: Compiling) -> None:
    """Have it called no more."""
    with contextlib.suppress(ValueError):
        sys.modules["torch._dynamo"].callback_handler.remove_start_callback(compiling)


class CallHooks:
    """Hooks of the calls of all modules, to be set and removed at every step: torch makes new handles every time.

    Args:
        begins: called with ``(module, args)``.
        ends: called with ``(module, args, output)``, also if the call raises.
    """

    def __init__(self, begins: Callable[..., None], ends: Callable[..., None] | None = None) -> None:
        self._id = RemovableHandle(_calls._global_forward_pre_hooks).id
        self._hooks: list[tuple[Any, Any]] = [(_calls._global_forward_pre_hooks, begins)]
        if ends is not None:
            self._hooks += [(_calls._global_forward_hooks, ends), (_calls._global_forward_hooks_always_called, True)]

    def set(self) -> None:
        """Have them called."""
        for among, hook in self._hooks:
            among[self._id] = hook

    def remove(self) -> None:
        """Have them called no more."""
        for among, _ in self._hooks:
            among.pop(self._id, None)


def never_compile(code: types.CodeType) -> bool:
    """Have Dynamo leave calls of a function to Python that happen where what it compiles is interrupted.

    It would take the function for part of a graph there: of one that asks whether it is compiled, the result is lost.

    Returns:
        False if Dynamo is not there yet.
    """
    skip = getattr(sys.modules.get("torch._dynamo.eval_frame"), "skip_code", None)
    if skip is not None:
        skip(code)
    return skip is not None


def take_stack() -> list[TorchFunctionMode]:
    """Take every function mode off the calling thread's stack; the lowest first."""
    return [_pop_mode() for _ in range(_C._len_torch_function_stack())][::-1]


def on_stack(mode: TorchFunctionMode) -> bool:
    """True if it is on the calling thread's stack, which is empty most of the time."""
    return _C._len_torch_function_stack() > 0 and mode in _get_current_function_mode_stack()


class quiet:  # noqa: N801  # some six times in every step: a generator, and torch's own way, take three times as long
    """Neither autograd nor any function or dispatch mode, the user's or ours, sees what is called in this context."""

    __slots__ = ("_dispatch", "_function", "_gradients")

    def __enter__(self) -> None:
        self._function = _C.DisableTorchFunction()
        self._function.__enter__()  # first: modes see the switching of gradients too
        self._gradients = torch.is_grad_enabled()
        _C._set_grad_enabled(False)
        self._dispatch = _disable_current_modes() if _C._len_torch_dispatch_stack() > 0 else None
        if self._dispatch is not None:
            self._dispatch.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self._dispatch is not None:
            self._dispatch.__exit__(*error)
        _C._set_grad_enabled(self._gradients)
        self._function.__exit__(*error)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """No mode that is on a stack now sees what is called in this context; one entered in here does. No gradients.

    The context of `torch.set_default_device` stays: it decides where tensors are made.
    """
    stack = take_stack()
    kept = [m for m in stack if isinstance(m, DeviceContext)]
    try:
        for m in kept:
            _push_mode(m)
        with contextlib.ExitStack() as inner:
            inner.enter_context(torch.no_grad())
            if _C._len_torch_dispatch_stack() > 0:
                inner.enter_context(_disable_current_modes())
            yield
    finally:
        for _ in kept:
            _pop_mode()
        for m in stack:
            _push_mode(m)


def saved(node: Any, name: str) -> Tensor | None:
    """What an autograd node has saved under ``name`` ("result", "other"), detached; None if it cannot be read."""
    if saved_tensor_hooks_active():
        return None
    value = getattr(node, f"_saved_{name}", None)
    return value.detach() if isinstance(value, Tensor) else None


def common_store() -> Any:
    """The key-value store that all processes of a distributed training have in common; None if there is none."""
    c10d = sys.modules.get("torch.distributed.distributed_c10d")
    try:
        return None if c10d is None else c10d._get_default_store()
    except (ValueError, AttributeError):  # not initialised
        return None


def patience() -> float:
    """Seconds after which a process gives up waiting for the others: the shortest of all their groups."""
    c10d: Any = sys.modules["torch.distributed.distributed_c10d"]
    found = [600.0]
    for group in c10d._world.pg_map:
        for device in group._device_types:
            with contextlib.suppress(RuntimeError, AttributeError):  # not every kind of backend says it
                found.append(group._get_backend(device).options._timeout.total_seconds())
    return min(found)


def coalescing() -> frozenset[Any]:
    """The groups of processes in which several calls are about to become one."""
    c10d: Any = sys.modules["torch.distributed.distributed_c10d"]
    return frozenset(c10d._world.pg_coalesce_state)


def end_coalescing(begun: frozenset[Any]) -> None:
    """Of groups in which that has begun after ``begun`` was asked for, and was broken off: nothing has been called."""
    c10d: Any = sys.modules["torch.distributed.distributed_c10d"]
    for group in coalescing() - begun:
        del c10d._world.pg_coalesce_state[group]
        for device in group._device_types:
            with contextlib.suppress(RuntimeError):  # it never began there
                group._end_coalescing(device)


@contextlib.contextmanager
def unseen() -> Iterator[None]:
    """No dispatch mode sees what is called in this context."""
    if _C._len_torch_dispatch_stack() > 0:
        with _disable_current_modes():
            yield
    else:
        yield
