"""Whether the function mode is on the training thread's stack: one place puts it there and takes it away.

`Recorder` decides what a step needs. What else may be called while the mode is there, and must not meet it, is kept
apart here: modules beside the ones that are recorded, and whatever follows an evaluation whose loss is looked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from monitor.record.mode import StepMode
from monitor.record.private import before_compiling, compiles, stop_hearing


class Stack:
    """The place of ``mode`` on the calling thread's stack.

    Args:
        mode: what is put there.
        here: tells whether the calling thread is the one that trains, and no function that is watched runs.
        guard: calls a function; what it raises is the recording's problem, not the training's.
    """

    def __init__(self, mode: StepMode, here: Callable[[], bool], guard: Callable[..., None]) -> None:
        self._mode, self._here, self._guard = mode, here, guard
        self._asides: list[bool] = []  # whether the mode was taken off for each call of a bystander under way
        self._window: Any = None  # the hook of all modules that ends a look
        self._compiling: Any = None  # gives what ends it too, before something is compiled

    @property
    def on(self) -> bool:
        """True if the mode is there."""
        return self._mode.on_stack()

    def set(self, on: bool) -> None:
        """Put the mode there, or take it away; a look is over."""
        if self._window is not None:
            self._window.remove()
            self._window = None
        if on != self.on:
            if on:
                self._mode.enter()
            else:
                self._mode.leave()

    def end(self) -> None:
        """Take the mode away for good."""
        self.set(False)
        compiling = self._compiling() if self._compiling is not None else None
        if compiling is not None:
            stop_hearing(compiling)

    # ---- modules beside the ones that are recorded

    def step_aside(self, module: nn.Module, compiled: bool) -> None:
        """A bystander is called: no mode for it if it evaluates, or is ``compiled``."""
        evaluates = not (module.training and torch.is_grad_enabled())
        self._asides.append(self.on and (evaluates or compiled))
        if self._asides[-1]:
            self.set(False)

    def step_back(self) -> None:
        """It has been called. It may have called one of ours, after which the mode is there already."""
        if self._asides and self._asides.pop():
            self.set(True)

    # ---- what follows an evaluation

    def look(self) -> bool:
        """Watch what is called now, up to the next call of any module that has parts; False if it cannot be done.

        So no layer meets the mode that would leave its fast path for it. Never where something is to be compiled.
        """
        if self.on or compiles():
            return False
        if self._compiling is None or self._compiling() is None:  # a reset of Dynamo forgets it
            self._compiling = before_compiling(self._compiles)
        if self._compiling is None:
            return False
        self.set(True)
        self._window = register_module_forward_pre_hook(self._module_called)
        return True

    @property
    def looking(self) -> bool:
        """True from `look` on: what is called is no part of a step."""
        return self._window is not None

    def _module_called(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling() and (module._parameters or module._modules):
            self._end_look()

    def _compiles(self) -> None:
        """Something is to be compiled or exported: neither the mode nor a hook of all modules may be met there."""
        if self.looking:
            self._guard(self._end_look)

    def _end_look(self) -> None:
        if self._here() and self.on:  # it is not while a function it has been told of calls a module
            self.set(False)
