"""The tensors a root module is called with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from monitor.record.passes.input import MERGE, STATS, input_stats
from monitor.record.site import Site

#: Tensors of one call that are followed; more would be an unusual interface and a growing cost.
_MOST = 8


class InputSite(Site):
    """Statistics of every tensor argument of a root module's training forward."""

    name = "input"
    dense = True

    def __init__(self, recorder: Any) -> None:
        super().__init__(recorder)
        self._left_out = 0

    def on_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record each tensor argument under ``input[0]`` or its keyword."""
        named = [(f"input[{i}]", x) for i, x in enumerate(args)] + list(kwargs.items())
        prefix = self.rec.prefix(module)
        found = 0
        for name, x in named:
            if type(x) is not Tensor or x.numel() == 0 or x.layout != torch.strided or x.is_complex():
                continue
            found += 1
            if found > _MOST:
                continue
            values = input_stats(x)
            at = slice(len(STATS) - len(values), len(STATS))
            self.rec.emit("input", STATS, prefix + name, values, MERGE, at)
        self._left_out = max(self._left_out, found - _MOST)

    def missing(self) -> Sequence[tuple[str, str]]:
        """Arguments beyond `_MOST`. A model that is called without tensors lacks nothing."""
        if self._left_out == 0:
            return ()
        return (("input_rms", f"of so many tensors of one call the first {_MOST}; {self._left_out} others are not"),)
