"""Seeing the calls of a training step (the loss, backward, clipping, unscaling) without changing one of them.

A function mode is the only observer that sees ``from … import cross_entropy`` made before it, needs no patch, and
leaves results alone; but while any mode is on the stack, `torch.nn.TransformerEncoder` leaves its fast path in
evaluation and Dynamo recompiles what it enters. So the mode is on the stack only from a root module's training
forward to the optimizer step, and never inside a compiled region; `Recorder` decides when. A forward itself is watched
only at the steps at which something inside it is looked at, unless losses are made in there: each call costs more then.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, _push_mode
from torch.utils._device import DeviceContext

from monitor.record.private import never_compile, on_stack, take_stack, transformed

#: ``(args, kwargs, result)``; result is None when called before the function runs.
Watcher = Callable[[tuple[Any, ...], dict[str, Any], Any], None]


class StepMode(TorchFunctionMode):
    """Hands watched calls to their watchers. Every other call costs one dictionary look-up.

    Args:
        before: function -> watcher called before it runs.
        after: function -> watcher called with its result.
    """

    def __init__(self, before: dict[Any, Watcher], after: dict[Any, Watcher]) -> None:
        super().__init__()
        self.before = before
        self.after = after
        self.watched = before.keys() | after.keys()
        #: Calls seen, for the account of our own cost.
        self.calls = 0
        #: Told of every call while a step is taped.
        self.tape: Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None] | None = None
        #: True while a watched function runs; the mode is off the stack then and must not be moved.
        self.inside = False
        self._thread = 0  # on whose stack it was put last
        self._left_alone = False  # by Dynamo

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` as if nobody watched, telling its watchers."""
        if torch.compiler.is_compiling():
            return func(*args, **(kwargs or {}))
        watched = func in self.watched
        if (watched or self.tape is not None) and threading.get_ident() != self._thread:
            return func(*args, **(kwargs or {}))  # on a stack where it was left behind
        self.calls += 1
        if not watched or transformed():
            result = func(*args, **(kwargs or {}))
            if self.tape is not None:
                self.tape(func, args, kwargs or {}, result)
            return result
        kwargs = kwargs or {}
        watcher = self.before.get(func)
        self.inside = True
        try:
            if watcher is not None:
                watcher(args, kwargs, None)
            result = func(*args, **kwargs)
            watcher = self.after.get(func)
            if watcher is not None:
                watcher(args, kwargs, result)
            if self.tape is not None:
                self.tape(func, args, kwargs, result)
        finally:
            self.inside = False
        return result

    def on_stack(self) -> bool:
        """True if this mode is on the calling thread's stack."""
        return on_stack(self)

    def enter(self) -> None:
        """Put the mode at the bottom of the calling thread's stack (above the context of `torch.set_default_device`).

        At the bottom, a ``with`` block of the user's own mode that is open now still ends in its own order. So does
        ``with torch.device(…)``, which takes whatever is on top; only `torch.set_default_device` looks at the bottom.
        """
        if not self._left_alone:
            self._left_alone = never_compile(StepMode.__torch_function__.__code__)
        self._thread = threading.get_ident()
        stack = take_stack()
        # the former is pushed from C++, the latter has been entered in Python
        at = 1 if stack and isinstance(stack[0], DeviceContext) and hasattr(stack[0], "old_device") else 0
        for m in (*stack[:at], self, *stack[at:]):
            _push_mode(m)

    def leave(self) -> None:
        """Take the mode off the calling thread's stack, wherever it stands in it."""
        for m in take_stack():
            if m is not self:
                _push_mode(m)
