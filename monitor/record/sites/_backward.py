"""What a call of ``backward`` was made on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def losses(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors in the arguments of `torch.Tensor.backward` or `torch.autograd.backward`."""
    given = args[0] if args else kwargs.get("tensors")
    return [given] if isinstance(given, Tensor) else list(given or ())
