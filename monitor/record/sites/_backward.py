"""What a call of ``backward`` was made on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

#: Both ways of calling it.
BACKWARD = (torch.Tensor.backward, torch.autograd.backward)


def losses(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors in the arguments of a function of `BACKWARD`."""
    given = args[0] if args else kwargs.get("tensors")
    return [given] if isinstance(given, Tensor) else list(given or ())
