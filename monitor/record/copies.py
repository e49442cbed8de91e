"""Keeps our hooks out of copies and saved files of a hooked module: those are as if it had never been recorded."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from typing import Any

from torch import nn

#: Where a module keeps its forward hooks by number, and what it remembers of them by the same number.
_KEPT = {
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
}
_NAME = "__getstate__"


class WithoutHooks:
    """What pickle, `copy.deepcopy` and `torch.save` ask a hooked module for, found on the instance before its class.

    A hook in a saved model could not be loaded with ``weights_only=True``, whatever stands for it there. Classes that
    copy or pickle themselves in a way of their own are left alone.

    Args:
        module: a module with hooks.
        hooks: the hooks that no copy shall have.
    """

    def __init__(self, module: nn.Module, hooks: tuple[object, ...]) -> None:
        kind = type(module)
        self._module = weakref.ref(module)
        self._hooks = hooks
        self._usual = (
            kind.__reduce_ex__ is object.__reduce_ex__
            and kind.__reduce__ is object.__reduce__
            and not hasattr(kind, "__deepcopy__")
            and _NAME not in module.__dict__
        )
        if self._usual:
            object.__setattr__(module, _NAME, self)

    def __call__(self) -> Any:
        """The module's state without our hooks and without this object."""
        module = self._module()
        assert module is not None  # it is asking
        state: Any = type(module).__getstate__(module)
        if not isinstance(state, dict):
            return state
        state = {k: v for k, v in state.items() if k != _NAME}
        for kept, numbers in _KEPT.items():
            held = state.get(kept) or {}
            ours = {number for number, hook in held.items() if any(hook is h for h in self._hooks)}
            for key in (kept, *numbers):
                if not ours.isdisjoint(state.get(key) or ()):
                    state[key] = OrderedDict((n, x) for n, x in state[key].items() if n not in ours)
        return state

    def remove(self) -> None:
        """Take it off the module."""
        module = self._module()
        if self._usual and module is not None:
            module.__dict__.pop(_NAME, None)
