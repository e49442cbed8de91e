"""Changing gradients inside an optimizer's own step: what every remedy that acts on gradients is hooked in with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


def before_update(optimizer: Optimizer, change: Callable[[], None]) -> RemovableHandle:
    """Call ``change`` in every step of ``optimizer``, when the gradients are there and nothing is updated yet.

    Args:
        optimizer: any optimizer. If its step is given a closure, ``change`` runs after each evaluation of it.
        change: changes the gradients in place.

    Returns:
        A handle whose ``remove()`` ends it.
    """

    def wrapped(closure: Callable[[], Any]) -> Callable[[], Any]:
        def evaluate() -> Any:
            loss = closure()
            change()
            return loss

        return evaluate

    def hook(
        optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # args[0] is the optimizer itself: the hook sits around the unbound method
        if len(args) > 1 and callable(args[1]):
            return (args[0], wrapped(args[1]), *args[2:]), kwargs
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": wrapped(kwargs["closure"])}
        change()
        return None

    return optimizer.register_step_pre_hook(hook)
