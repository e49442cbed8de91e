"""Keeps our hooks out of copies and saved files of a hooked module: those are as if it had never been recorded.

A hook in a saved model could not be loaded with ``weights_only=True``, whatever stands for it there. Nor can
`torch.jit.script` compile one.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import OrderedDict
from collections.abc import Callable, Set, ValuesView
from typing import Any

from torch import nn

#: Where a module keeps forward hooks by number, and what it remembers of them by the same number.
_KEPT = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


class _Hooks(OrderedDict[int, Any]):
    """A module's hooks, copied and pickled as a plain dictionary without ours."""

    ours: Set[int] = frozenset()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._theirs().__reduce_ex__(protocol)

    def values(self) -> ValuesView[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """What `torch.jit.script` compiles; a call of the module asks for the items."""
        return self._theirs().values()

    def _theirs(self) -> OrderedDict[int, Any]:
        return OrderedDict((n, hook) for n, hook in self.items() if n not in self.ours)


def hook_calls(module: nn.Module, before: Callable[..., None], after: Callable[..., None]) -> list[Any]:
    """Have the calls of ``module`` told, as if nobody did.

    Args:
        module: any module that no fast path of its own is lost to.
        before: called with ``(module, args, kwargs)``, before the hooks of others.
        after: called with ``(module, args, kwargs, output)``, also if the call raises.

    Returns:
        What has a ``remove``; in this order.
    """
    hidden = HiddenHooks(module)
    handles = (
        module.register_forward_pre_hook(_Before(before), with_kwargs=True, prepend=True),
        module.register_forward_hook(_After(after), with_kwargs=True, always_call=True),
    )
    return [*(hidden.hide(handle) for handle in handles), hidden]


class _Stays:
    """A hook for which one stands that does nothing where it could not be kept out of a copy.

    What stands there is of the standard library, so that a saved model loads where there is no monitor.
    """

    def __init__(self, tell: Callable[..., None]) -> None:
        self._tell = tell

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")


# two functions, not one with a variable number of arguments, which Dynamo would compile twice
class _Before(_Stays):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._tell(module, args, kwargs)


class _After(_Stays):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._tell(module, args, kwargs, output)


class HiddenHooks:
    """The hooks that no copy of a module shall have.

    Where the module has hooks of the user's already, it keeps its dictionaries, to which their handles refer, and ours
    are seen by those who copy it.

    Args:
        module: whose hooks are to be hidden; before they are registered.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._numbers: set[int] = set()
        self._hidden: list[str] = []
        if not any(module.__dict__[key] for key in _KEPT):
            for key in _KEPT:
                hooks = _Hooks()
                hooks.ours = self._numbers
                module.__dict__[key] = hooks
                self._hidden.append(key)

    def hide(self, handle: Any) -> Any:
        """Hide the hook that this handle removes; gives the handle back."""
        self._numbers.add(handle.id)
        return handle

    def remove(self) -> None:
        """Give the module plain dictionaries again, if nobody else has put a hook there."""
        module = self._module()
        for key in self._hidden if module is not None else ():
            held = module.__dict__.get(key)
            if isinstance(held, _Hooks) and held.ours is self._numbers and not held:
                module.__dict__[key] = OrderedDict()
