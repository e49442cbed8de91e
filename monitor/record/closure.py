"""The closure that an optimizer's step is given: forward and backward run in there, after the step has begun.

Where an evaluation of it begins and ends is known if the step is given a function that says so in its place, which
hooks before a step may do. When the first one ends the gradients are those that the update is made with, clipped too,
and the parameters are as yet those of the step: unless the optimizer has moved them beforehand to see what is around.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Closure = Callable[..., Any]
#: Positional and keyword arguments of a step, the optimizer first.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def find_closure(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Closure | None:
    """The closure in the arguments of a step; None if there is none.

    An object of a class of its own is no plain function, whatever it can do: the optimizer may look at what it is.
    """
    given = args[1] if len(args) > 1 else kwargs.get("closure")
    return given if isinstance(given, types.FunctionType | types.MethodType | functools.partial) else None


def with_closure(args: tuple[Any, ...], kwargs: dict[str, Any], closure: Closure) -> Arguments:
    """The same arguments with another closure."""
    if len(args) > 1:
        return (args[0], closure, *args[2:]), kwargs
    return args, {**kwargs, "closure": closure}


def watched(closure: Closure, begins: Callable[[], bool], ends: Callable[[bool], None]) -> Closure:
    """``closure``, with a word before and after each evaluation.

    Args:
        closure: returns what it returns, raises what it raises.
        begins: called first; returns whether ``ends`` is to be called.
        ends: called last, with False if it raised.
    """

    @functools.wraps(closure, updated=())
    def evaluate(*args: Any, **kwargs: Any) -> Any:
        if not begins():
            return closure(*args, **kwargs)
        done = False
        try:
            result = closure(*args, **kwargs)
            done = True
        finally:
            ends(done)
        return result

    return evaluate


def fingerprint(optimizer: Optimizer) -> Tensor:
    """``(parameter,)`` int64, on one device: the sum of each one's bits, of those that are plain tensors."""
    sums = [
        _bits(p).sum(dtype=torch.int64)
        for group in optimizer.param_groups
        for p in group["params"]
        if type(p.data) is Tensor and p.layout == torch.strided
    ]
    return torch.stack([s.to(sums[0].device) for s in sums]) if sums else torch.empty(0)


def _bits(p: Tensor) -> Tensor:
    real = torch.view_as_real(p.detach()) if p.is_complex() else p.detach()
    return real.view(_BITS[real.element_size()])
