"""Measure a live model and leave no trace of it.

Inside `undisturbed` a model can be run as often as one likes: random numbers, modes, buffers, attributes and backend
flags are afterwards bit for bit what they were. Parameters, their ``.grad`` and their hooks are never touched, because
the measurement runs on stand-ins (see `monitor.curvature.closure`).
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

Mode = Literal["eval", "train"]


@dataclass(frozen=True)
class RandomState:
    """Every random-number state a forward pass may draw from: Python, NumPy, and torch on ``devices``."""

    python: Any
    numpy: Any
    cpu: torch.Tensor
    devices: tuple[tuple[torch.device, torch.Tensor], ...]

    @staticmethod
    def capture(devices: Sequence[torch.device] = ()) -> RandomState:
        """The present states; of ``devices``, accelerators are read and the CPU is always included."""
        accelerators = [d for d in dict.fromkeys(devices) if d.type != "cpu"]
        states = tuple((d, torch.get_device_module(d).get_rng_state(d)) for d in accelerators)
        return RandomState(random.getstate(), np.random.get_state(), torch.get_rng_state(), states)

    def restore(self) -> None:
        """Put these states back; the same draws follow again."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        for device, state in self.devices:
            torch.get_device_module(device).set_rng_state(state, device)


@contextmanager
def undisturbed(model: nn.Module, mode: Mode, devices: Sequence[torch.device]) -> Iterator[None]:
    """Run ``model`` in here as a twice-differentiable eager function; on exit everything is as it was.

    Attention uses the math kernel (the fused ones have no second derivative), autocast is off (its second derivative
    is not symmetric), compiled code runs eagerly (compiled backward passes cannot be differentiated again) without
    being recompiled later, recurrent layers leave cuDNN, and float32 products on CUDA are not rounded to TF32.

    Args:
        model: what will be called. Its submodules' attributes and buffer tables are put back on exit; an object they
            refer to (a list, a dict, a tensor that is not a buffer) that is changed in place is not.
        mode: ``"eval"`` runs every module in evaluation mode; ``"train"`` leaves the modes as they are.
        devices: where the parameters are.

    Cost: O(modules) on entry and exit, no copy of a parameter.
    """
    random_state = RandomState.capture(devices)
    with ExitStack() as stack:
        stack.callback(random_state.restore)
        stack.enter_context(_same_attributes(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in {"cpu", *(d.type for d in devices)}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        for wrapper in (m for m in model.modules() if isinstance(m, DistributedDataParallel)):
            wrapper.require_backward_grad_sync = False  # no reduction is prepared, no buffer is broadcast
            wrapper.require_forward_param_sync = False
        if "torch._dynamo" in sys.modules:  # nothing can be compiled before this is imported
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if any(d.type == "cuda" for d in devices):
            stack.enter_context(_full_precision())
            if any(isinstance(m, nn.RNNBase) for m in model.modules()):
                stack.enter_context(_attribute(torch.backends.cudnn, "enabled", False))
        if mode == "eval":
            model.eval()
        yield


@contextmanager
def cloned_buffers(model: nn.Module) -> Iterator[None]:
    """Run ``model`` in here on copies of its buffers; shared ones stay shared."""
    tables = [m._buffers for m in model.modules()]
    before = [dict(table) for table in tables]
    clones = {id(b): b.detach().clone() for table in tables for b in table.values() if b is not None}
    try:
        for table in tables:
            table.update({key: clones[id(b)] for key, b in table.items() if b is not None})
        yield
    finally:
        for table, content in zip(tables, before, strict=True):
            table.clear()
            table.update(content)


@contextmanager
def _same_attributes(model: nn.Module) -> Iterator[None]:
    # Shallow: `training`, counters, caches and hooks' leftovers live in __dict__; parameters and buffers in tables.
    saved: list[tuple[MutableMapping[str, Any], dict[str, Any]]] = []
    for module in model.modules():
        for table in (module.__dict__, module._parameters, module._buffers, module._modules):
            saved.append((table, dict(table)))
    try:
        yield
    finally:
        for table, content in saved:
            same = len(table) == len(content) and all(table.get(k, saved) is v for k, v in content.items())
            if not same:
                table.clear()
                table.update(content)


@contextmanager
def _attribute(holder: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)


@contextmanager
def _full_precision() -> Iterator[None]:
    backends = torch.backends
    with ExitStack() as stack:
        if hasattr(backends.cuda.matmul, "fp32_precision"):  # torch >= 2.9; the older switches may not be mixed with it
            cudnn: Any = backends.cudnn
            for holder in (backends.cuda.matmul, cudnn.conv, cudnn.rnn):
                stack.enter_context(_attribute(holder, "fp32_precision", "ieee"))
        else:
            stack.enter_context(_attribute(backends.cuda.matmul, "allow_tf32", False))
            stack.enter_context(_attribute(backends.cudnn, "allow_tf32", False))
        yield
