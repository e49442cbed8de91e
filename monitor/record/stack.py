"""Whether the function mode is on the training thread's stack: one place puts it there and takes it away.

`Recorder` decides what a step needs. What else may be called while the mode is there, and must not meet it, is kept
apart here: modules beside the ones that are recorded, and whatever follows an evaluation whose loss is looked for.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from monitor.record.mode import StepMode
from monitor.record.private import CallHooks, before_compiling, compiles, stop_hearing


class Stack:
    """The place of ``mode`` on the calling thread's stack.

    Args:
        mode: what is put there.
        entries: ids of the modules whose calls are told elsewhere.
        here: tells whether the calling thread is the one that trains, and no function that is watched runs.
        guard: calls a function; what it raises is the recording's problem, not the training's.
    """

    def __init__(
        self, mode: StepMode, entries: Container[int], here: Callable[[], bool], guard: Callable[..., None]
    ) -> None:
        self._mode, self._entries, self._here, self._guard = mode, entries, here, guard
        #: Calls of other modules under way: whose, and whether the mode was taken off for it.
        self._asides: list[tuple[int, bool]] = []
        self._between = CallHooks(self._begins, self._ends)
        self._after = CallHooks(self._called)
        self._heard: CallHooks | None = None  # those of them that are set
        self._registering: Any = None  # and of their making
        self._compiling: Any = None  # gives what is told before something is compiled
        #: True from `look` on: what is called is no part of a step.
        self.looking = False

    @property
    def on(self) -> bool:
        """True if the mode is there."""
        return self._mode.on_stack()

    def set(self, on: bool) -> None:
        """Put the mode there, or take it away; a look is over."""
        self.looking = False
        if not self._asides:  # or the end of that call would not be heard of
            self._unhear()
        self._put(on)

    def rest(self) -> None:
        """Take the mode away until somebody wants it."""
        self._asides.clear()
        self.set(False)

    def end(self) -> None:
        """Take the mode away for good."""
        self.rest()
        compiling = self._compiling() if self._compiling is not None else None
        if compiling is not None:
            stop_hearing(compiling)
        if self._registering is not None:
            self._registering.remove()

    def _put(self, on: bool) -> None:
        if on != self.on:
            (self._mode.enter if on else self._mode.leave)()

    # ---- between the training forward and the step

    def wait(self) -> None:
        """Put the mode there for what follows a training forward; other modules that are called do not meet it."""
        self.set(True)
        if not self._asides:
            self._hear(self._between)

    def step_aside(self, module: nn.Module, compiled: bool = False) -> None:
        """Another module is called: no mode for it if it evaluates, or is ``compiled``."""
        evaluates = not (module.training and torch.is_grad_enabled())
        off = self.on and (evaluates or compiled)
        self._asides.append((id(module), off))
        if off:
            self._put(False)

    def step_back(self, module: nn.Module) -> None:
        """It has been called. It may have called one of ours, after which the mode is there already."""
        if self._asides and self._asides[-1][0] == id(module) and self._asides.pop()[1]:
            self._put(True)

    def _begins(self, module: nn.Module, args: Any) -> None:
        if self._other(module):
            self._guard(self.step_aside, module)

    def _ends(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._other(module):
            self._guard(self.step_back, module)

    def _other(self, module: nn.Module) -> bool:
        """True if a call of ``module``, which is not told elsewhere, may meet the mode."""
        return (
            not torch.compiler.is_compiling()
            and _has_parts(module)
            and id(module) not in self._entries
            and self._here()
        )

    # ---- what follows an evaluation

    def look(self) -> bool:
        """Watch what is called now, up to the next call of any module that has parts; False if it cannot be done.

        So no layer meets the mode that would leave its fast path for it.
        """
        if self.on or not self._hear(self._after):
            return False
        self._put(True)
        self.looking = True
        return True

    def _called(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling() and _has_parts(module):
            self._end_look()

    def _end_look(self) -> None:
        if self._here() and self.on:  # it is not while a function it has been told of calls a module
            self.set(False)

    # ---- all modules

    def _hear(self, hooks: CallHooks) -> bool:
        """Be told of the calls of all modules; False if it cannot be done: never where something may be compiled."""
        if compiles():
            return False
        if self._compiling is None or self._compiling() is None:  # a reset of Dynamo forgets it
            self._compiling = before_compiling(self._compiles)
        if self._compiling is None:
            return False
        if self._registering is None:
            self._registering = register_module_module_registration_hook(self._registered)
        self._unhear()
        hooks.set()
        self._heard = hooks
        return True

    def _unhear(self) -> None:
        if self._heard is not None:
            self._heard.remove()
            self._heard = None

    def _registered(self, module: nn.Module, name: str, part: Any) -> None:
        """`torch.compile` makes a module, whose call warns of a hook on all modules."""
        if name == "_orig_mod" and self._heard is not None:
            self._compiles()

    def _compiles(self) -> None:
        """Something is to be compiled or exported: no hook of all modules may be met there, nor the mode of a look.

        That of a step may, as it will be at the next: what is compiled without it would be compiled again.
        """
        if self.looking:
            self._guard(self._end_look)
        else:
            self._unhear()


def _has_parts(module: nn.Module) -> bool:
    return bool(module._parameters or module._modules)
