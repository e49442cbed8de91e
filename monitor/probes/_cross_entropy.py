"""Calls of `torch.nn.functional.cross_entropy` as they were made: their rows, one by one."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_SIGNATURE = inspect.signature(F.cross_entropy)


def _call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = _SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def losses(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Every row's own loss of one call, ``(row,)``, and which of them count, ``(row,)`` bool."""
    call = _call(args, kwargs) | {"reduction": "none", "size_average": None, "reduce": None}
    loss = F.cross_entropy(**call).reshape(-1)
    return loss, _counted(call).reshape(-1)


def counted_rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The scores ``(row, class)`` of the rows of one call that count."""
    call = _call(args, kwargs)
    z: Tensor = call["input"]
    rows = z[None] if z.dim() == 1 else z.movedim(1, -1)
    return rows.reshape(-1, rows.shape[-1])[_counted(call).reshape(-1)]


def _counted(call: dict[str, Any]) -> Tensor:
    z, target = call["input"], call["target"]
    if target.is_floating_point():
        return torch.ones(z.numel() // z.shape[1 if z.dim() > 1 else 0], dtype=torch.bool, device=z.device)
    return target != call["ignore_index"]
