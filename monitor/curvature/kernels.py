"""Layers whose second derivative torch computes slowly on a CPU, computed another way: the same function to rounding.

A Hessian product spends most of its time in the second derivative of a few layers. Torch's for a convolution swaps
images and kernels, which no library is fast at, and that of a batch normalisation in evaluation mode goes through the
formulas of training. Here the first is made of the three convolutions that training uses, channels last, and the second
is a multiplication and an addition. The derivatives of a GELU, which torch works out anew in every product, are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

_C: Any = torch._C
_aten: Any = torch.ops.aten
_convolve = _aten.convolution.default
_convolve_back = _aten.convolution_backward.default


def twice_differentiable_kernels() -> AbstractContextManager[Any]:
    """Compute convolutions, batch normalisations and GELUs in here so that their second derivative is cheap.

    Only reverse-mode differentiation works on what is computed in here. Tensors elsewhere than on a CPU or of several
    dtypes, arguments of an unusual form, and what is computed under autocast, functorch or checkpointing are left to
    torch.

    Cost: a Hessian product of a small residual network takes .77 times the CPU time it takes outside, one of a small
    transformer .94 times.
    """
    return _Kernels()


class _Kernels(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        replacement = _REPLACED.get(func) if "input" not in kwargs else None
        found = replacement(*args, **kwargs) if replacement is not None else None
        return func(*args, **kwargs) if found is None else found


def _plain(*given: Any) -> bool:
    # functorch needs more rules for such functions; a checkpoint computes them once more, outside, and compares
    if _C._are_functorch_transforms_active() or _C._autograd._top_saved_tensors_default_hooks(False) is not None:
        return False
    if torch.is_autocast_enabled("cpu"):  # it chooses the precision for the functions of torch
        return False
    tensors = [t for t in given if t is not None]
    known = all(type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" for t in tensors)
    return known and len({t.dtype for t in tensors}) == 1


def _conv2d(
    x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Tensor | None:
    numbers = [[n, n] if isinstance(n, int) else n for n in (stride, padding, dilation)]
    pairs = all(isinstance(n, (tuple, list)) and len(n) == 2 for n in numbers)
    if not (pairs and _plain(x, weight, bias) and x.dim() == weight.dim() == 4):
        return None
    stride, padding, dilation = (list(n) for n in numbers)
    weight = weight.contiguous(memory_format=torch.channels_last)
    return _Convolution.apply(x, weight, bias, (stride, padding, dilation, False, [0, 0], groups))


def _batch_norm(
    x: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    if training or running_mean is None or running_var is None:
        return None
    if not _plain(x, running_mean, running_var, weight, bias) or x.dim() < 2:
        return None
    shape = [1, -1] + [1] * (x.dim() - 2)
    rescale = (running_var + eps).rsqrt()
    scale = rescale if weight is None else rescale * weight
    shift = -running_mean * scale if bias is None else bias - running_mean * scale
    return x * scale.view(shape) + shift.view(shape)


def _gelu(x: Any, approximate: str = "none") -> Tensor | None:
    return _Gelu.apply(x, approximate) if _plain(x) else None


_REPLACED: Mapping[Any, Callable[..., Tensor | None]] = {
    F.conv2d: _conv2d,
    F.batch_norm: _batch_norm,
    F.gelu: _gelu,
}


class _Convolution(torch.autograd.Function):
    """The convolution; its backward pass is `_ConvolutionBackward`, and so has a backward pass in its turn."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, how: Sequence[Any]) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.how = how
        return _convolve(x, w, b, *how)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, w = ctx.saved_tensors
        return *_ConvolutionBackward.apply(g, x, w, ctx.how, ctx.needs_input_grad[:3]), None


class _ConvolutionBackward(torch.autograd.Function):
    """(∂x, ∂w, ∂b) from the slope g of the output: linear in g, in w and in x."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, w: Tensor, how: Sequence[Any], wanted: Sequence[bool]) -> Any:
        ctx.save_for_backward(g, x, w)
        ctx.how = how
        ctx.set_materialize_grads(False)
        return _convolve_back(g, x, w, [len(w)], *how, list(wanted))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, along_x: Tensor | None, along_w: Tensor | None, along_b: Tensor | None
    ) -> Any:
        g, x, w = ctx.saved_tensors
        needs_g, needs_x, needs_w = ctx.needs_input_grad[:3]
        for_g, for_x, for_w = None, None, None
        if along_x is not None:
            for_g = _convolve(along_x, w, None, *ctx.how) if needs_g else None
            for_w = _convolve_back(g, along_x, w, None, *ctx.how, [False, True, False])[1] if needs_w else None
        if along_w is not None:
            along_w = along_w.contiguous(memory_format=torch.channels_last)
            if needs_g:
                part = _convolve(x, along_w, None, *ctx.how)
                for_g = part if for_g is None else for_g.add_(part)
            for_x = _convolve_back(g, x, along_w, None, *ctx.how, [True, False, False])[0] if needs_x else None
        if along_b is not None and needs_g:
            part = along_b.view(1, -1, 1, 1).expand_as(g)
            for_g = part if for_g is None else for_g.add_(part)
        return for_g, for_x, for_w, None, None


class _Gelu(torch.autograd.Function):
    """The activation; its two derivatives are computed on the first way back, and serve every product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, approximate: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.approximate, ctx.derivatives = approximate, None
        return _aten.gelu.default(x, approximate=approximate)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        if ctx.derivatives is None:
            ctx.derivatives = _gelu_derivatives(x.detach(), ctx.approximate)
        slope, bend = ctx.derivatives
        return _Multiplication.apply(g, x, slope, bend) if torch.is_grad_enabled() else g * slope, None


def _gelu_derivatives(x: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    slope = _aten.gelu_backward.default(torch.ones_like(x), x, approximate=approximate)
    square = x * x
    if approximate == "none":  # x Φ(x) with φ = Φ'
        return slope, torch.exp(square / -2).mul_((2 - square) * (2 * math.pi) ** -0.5)
    a, k = 0.044715, (2 / math.pi) ** 0.5  # x (1 + tanh u) / 2 with u = k (x + a x³)
    t = torch.tanh(k * (x + a * square * x))
    inner = k * (1 + 3 * a * square)
    return slope, (1 - t * t) * (inner + x * (3 * a * k * x - t * inner * inner))


class _Multiplication(torch.autograd.Function):
    """g·f'(x), given f'(x) and f''(x)."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, slope: Tensor, bend: Tensor) -> Tensor:
        ctx.save_for_backward(slope, g * bend)
        return g * slope

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, along: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        slope, bend = ctx.saved_tensors
        needs_g, needs_x = ctx.needs_input_grad[:2]
        return along * slope if needs_g else None, along * bend if needs_x else None, None, None
