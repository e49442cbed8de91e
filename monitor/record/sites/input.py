"""The tensors a root module is called with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from monitor.record.passes.input import MERGE, STATS, fingerprints, input_stats, sizes
from monitor.record.site import Site

#: Tensors of one call that are followed; more would be an unusual interface and a growing cost.
_MOST = 8
#: What the host knows of an input on an accelerator, and what is computed there.
_N, _SIZES, _MARK = slice(0, 1), slice(1, 4), slice(4, 5)


class InputSite(Site):
    """Statistics of every tensor argument of a root module's training forward."""

    name = "input"
    dense = True

    def __init__(self, recorder: Any) -> None:
        super().__init__(recorder)
        self._left_out = 0
        self._elements: dict[
            str, tuple[int, int]
        ] = {}  # of the micro-batches so far, and of which attempt at an update
        self._names: dict[tuple[str, ...], tuple[str, ...]] = {}  # kept, as the row remembers places by identity

    def on_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record each tensor argument under ``input[0]`` or its keyword."""
        named = [(f"input[{i}]", x) for i, x in enumerate(args)] + list(kwargs.items())
        prefix = self.rec.prefix(module)
        found = 0
        elsewhere: dict[torch.device, dict[str, Tensor]] = {}
        for name, x in named:
            if type(x) is not Tensor or x.numel() == 0 or x.layout != torch.strided or x.is_complex():
                continue
            found += 1
            if found > _MOST:
                continue
            if not x.is_cpu:
                elsewhere.setdefault(x.device, {})[prefix + name] = x
                continue
            values = input_stats(x)
            at = slice(len(STATS) - len(values), len(STATS))
            self.rec.emit("input", STATS, prefix + name, values, MERGE, at)
        for inputs in elsewhere.values():
            self._on_device(inputs)
        self._left_out = max(self._left_out, found - _MOST)

    def _on_device(self, inputs: dict[str, Tensor]) -> None:
        """Record tensors of one accelerator: all fingerprints at once, and the sizes of those that have one."""
        for name, x in inputs.items():
            if x.is_floating_point():
                epoch, n = self._elements.get(name, (-1, 0))
                n = x.numel() + (n if epoch == self.rec.epoch else 0)
                self._elements[name] = self.rec.epoch, n
                self.rec.emit("input", STATS, name, (n,), at=_N)
                self.rec.emit("input", STATS, name, sizes(x), MERGE, _SIZES)
        names = tuple(inputs)
        names = self._names.setdefault(names, names)
        self.rec.emit_many("input", STATS, names, fingerprints(list(inputs.values())).unsqueeze(1), _MARK)

    def on_row(self) -> None:
        """Begin the next step."""
        self._elements.clear()

    def missing(self) -> Sequence[tuple[str, str]]:
        """Arguments beyond `_MOST`. A model that is called without tensors lacks nothing."""
        if self._left_out == 0:
            return ()
        return (("input_rms", f"of so many tensors of one call the first {_MOST}; {self._left_out} others are not"),)
