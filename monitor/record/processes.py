"""One of several processes measures by itself, while the others wait for it where they next need one another.

Nothing that it calls may speak to another process: an operation that one process enters alone stops the training for
ever, or takes the part of another. Every tensor operation is therefore looked at before it is executed, and one that
speaks to other processes, or that comes too late for their patience, ends the measurement instead.
"""

from __future__ import annotations

import gc
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from monitor.errors import UsageError
from monitor.record.private import coalescing, end_coalescing, patience, quiet

#: Namespaces of the operations through which processes speak to one another.
SPEAKING = frozenset(("c10d", "_c10d_functional", "_c10d_functional_autograd", "c10d_functional", "symm_mem"))
#: Part of the time after which the other processes give up that a measurement may take.
PART = 0.5
_PLAIN: Any = vars(Tensor)["__torch_dispatch__"]


class Alone(UsageError):  # noqa: N818 - says why, as `Refused` does
    """Something cannot be measured by one of several processes."""


def count() -> int:
    """How many processes may be training the same model."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def several() -> bool:
    """True if there are others."""
    return count() > 1


def first() -> bool:
    """True in the process that measures."""
    return dist.get_rank() == 0


def longest() -> float:
    """Seconds that a measurement may take while other processes wait; infinite if there are none."""
    return PART * patience() if several() else float("inf")


def wrappers() -> list[DistributedDataParallel]:
    """Everything alive that averages gradients over processes."""
    return [m for m in gc.get_objects() if issubclass(type(m), DistributedDataParallel)]


def averaged(roots: Sequence[nn.Module], wrappers: Sequence[nn.Module]) -> bool:
    """True if every parameter that is trained is inside one of the wrappers, which keep it whole in every process."""
    inside = {id(p) for w in wrappers for p in w.parameters()}
    return all(id(p) in inside for root in roots for p in root.parameters() if p.requires_grad)


@contextmanager
def alone(wrappers: Sequence[nn.Module]) -> Iterator[None]:
    """What is called in here is this process's own affair.

    Args:
        wrappers: calling one of these calls what is inside it and nothing more.

    Raises:
        Alone: in place of an operation that speaks to other processes, and when the others have waited for long.
    """
    with ExitStack() as stack:
        for w in wrappers:
            w.__dict__["forward"] = w.get_submodule("module").__call__
            stack.callback(w.__dict__.pop, "forward", None)
        begun = coalescing()
        stack.callback(lambda: end_coalescing(begun))
        stack.enter_context(Listener(longest()))
        yield


class Listener(TorchDispatchMode):
    """Looks at every operation; costs 6 µs for each, which is up to twice what a small model takes.

    Args:
        seconds: how long others wait.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds, self._until = seconds, time.monotonic() + seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in SPEAKING:
            called = func.name().partition("::")[2].strip("_").partition(".")[0]
            raise Alone(f"{_caller()} calls {called} of torch.distributed, in which all processes must take part")
        if time.monotonic() > self._until:
            raise Alone(f"it took more than the {self._seconds:.0f} s that the other processes are made to wait")
        if any(t.__torch_dispatch__ is not _PLAIN for t in types):
            return NotImplemented  # what such a tensor does instead is seen in its turn
        return func(*args, **(kwargs or {}))


def _caller() -> str:
    """The innermost module whose forward is running."""
    frame = sys._getframe(2)
    while frame is not None:
        held = frame.f_locals.get("self")
        if isinstance(held, nn.Module):
            return type(held).__name__
        frame = frame.f_back
    return "the loss"


class LocalGradients:
    """The gradients of this process's own batch: what its backward passes give before they are averaged.

    Summed over the backward passes of one attempt at an update, neither unscaled nor clipped.

    Args:
        models: whose parameters.
        epoch: tells the attempt that a backward pass belongs to.
        spent: told the seconds that each gradient has taken.
    """

    def __init__(self, models: Sequence[nn.Module], epoch: Callable[[], int], spent: Callable[[float], None]) -> None:
        self._epoch, self._spent = epoch, spent
        self._now = epoch()
        self._sums: dict[int, Tensor] = {}
        me: weakref.ref[LocalGradients] = weakref.ref(self)  # whoever drops this drops its hooks
        # at the node and not at the parameter: that keeps no trace of it, and is none of a compiler's business
        self._nodes = {id(p): get_gradient_edge(p).node for m in models for p in m.parameters() if p.requires_grad}
        self._hooks = [node.register_prehook(_Hook(me, key)) for key, node in self._nodes.items()]

    def take(self, epoch: int) -> Mapping[int, Tensor]:
        """By the id of each parameter that had one: the gradients of this attempt. Nothing is added from here on."""
        self.close()
        return self._sums if self._now == epoch else {}

    def close(self) -> None:
        """Look at no more gradients."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._nodes.clear()

    __del__ = close

    def add(self, key: int, gradient: Tensor | None) -> None:
        """A backward pass gives this gradient; on whatever thread it runs."""
        begin = time.perf_counter()
        if self._now != self._epoch():
            self._now = self._epoch()
            self._sums.clear()
        if gradient is not None:
            with quiet():
                dense = gradient.to_dense() if gradient.is_sparse else gradient
                known = self._sums.get(key)
                if known is None:
                    self._sums[key] = dense.clone()
                else:
                    known.add_(dense)
        self._spent(time.perf_counter() - begin)


class _Hook:
    def __init__(self, local: weakref.ref[LocalGradients], key: int) -> None:
        self._local, self._key = local, key

    def __call__(self, gradients: tuple[Tensor | None, ...]) -> None:
        local = self._local()
        if local is None:
            return
        try:
            local.add(self._key, gradients[0])
        except Exception:  # what is missing shows when it is compared
            local.close()
