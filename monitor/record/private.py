"""The private corners of torch that the recorder relies on, in one place. A test calls each of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

_C: Any = torch._C


def saved_tensor_hooks_active() -> bool:
    """True inside `save_on_cpu`, non-reentrant checkpointing and the like: reading a saved tensor would run a hook."""
    return _C._autograd._top_saved_tensors_default_hooks(False) is not None


def inside_functorch() -> bool:
    """True under `torch.func.vmap`, ``grad`` and the like, whose wrapped tensors must not be written to a buffer."""
    return _C._functorch.peek_interpreter_stack() is not None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Neither autograd nor any function or dispatch mode, the user's or ours, sees what is called in this context."""
    with _C.DisableTorchFunction(), torch.no_grad():  # in this order: modes see the switching of gradients too
        if _C._len_torch_dispatch_stack() > 0:
            with _disable_current_modes():
                yield
        else:
            yield


def saved(node: Any, name: str) -> Tensor | None:
    """What an autograd node has saved under ``name`` ("result", "other"), detached; None if it cannot be read."""
    if saved_tensor_hooks_active():
        return None
    value = getattr(node, f"_saved_{name}", None)
    return value.detach() if isinstance(value, Tensor) else None
