"""Normalisation layers over features: LayerNorm, RMSNorm and those that models write themselves."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from monitor.record.passes.norm import GAIN, INPUT, STATS, gain_offset, gain_stats, norm_stats
from monitor.record.sites._modules import ModuleSite, named

_NAME = re.compile(r"(?i)(rms|layer)_?norm")
#: Tokens from which it is decided how a hand-written layer uses its weight.
_TOKENS = 8


class NormSite(ModuleSite):
    """Input and gain of every normalisation layer, every fiftieth step and at a few early ones."""

    name, metric = "norm", "norm_layer"

    def __init__(self, recorder: Any) -> None:
        super().__init__(recorder)
        self._inputs: dict[str, Any] = {}
        self._gains: dict[str, Any] = {}
        self._offsets: weakref.WeakKeyDictionary[nn.Module, Tensor | float] = weakref.WeakKeyDictionary()

    def choose(self, root: nn.Module, prefix: str) -> Iterable[tuple[nn.Module, str]]:
        """Torch's own layers, and those that have their name and one vector of weights."""
        return [(m, name) for name, m in named(root, prefix) if _is_norm(m)]

    def read(self, module: nn.Module, name: str, inputs: Tensor, output: Tensor) -> None:
        """Read the input of one layer, and its gain."""
        weight = _local(module.weight)
        features = _features(module)
        if inputs.dim() < 2 or inputs.shape[-1] != features or inputs.shape != output.shape:
            return
        if module not in self._offsets:
            own = type(module) in _TORCH or weight is None or weight.numel() != features
            some = slice(0, _TOKENS)
            x, y = inputs.reshape(-1, features)[some], output.reshape(-1, features)[some]
            bias = getattr(module, "bias", None)
            bias = bias if isinstance(bias, Tensor) else None
            self._offsets[module] = 0.0 if own or weight is None else gain_offset(x, y, weight, bias)
        self._inputs[name] = norm_stats(inputs, _centred(module))
        if weight is not None:
            self._gains[name] = gain_stats(weight, self._offsets[module])

    def record(self) -> None:
        """Emit what the forward that is trained on had."""
        for values, at in ((self._inputs, INPUT), (self._gains, GAIN)):
            if values:
                rows = list(values.values())
                device = self.rec.device
                joined = torch.stack([r.to(device) for r in rows]) if isinstance(rows[0], Tensor) else np.stack(rows)
                self.rec.emit_many("norm", STATS, list(values), joined, at)
        self.forget()

    def forget(self) -> None:
        """Drop what was never trained on."""
        self._inputs.clear()
        self._gains.clear()


_TORCH: tuple[type[nn.Module], ...] = (nn.LayerNorm, nn.RMSNorm)


def _is_norm(module: nn.Module) -> bool:
    if type(module) in _TORCH:
        return len(module.normalized_shape) == 1  # pyright: ignore[reportArgumentType]
    weight = module._parameters.get("weight")
    return (
        weight is not None and weight.dim() == 1 and not module._modules and bool(_NAME.search(type(module).__name__))
    )


def _features(module: nn.Module) -> int:
    shape = getattr(module, "normalized_shape", None)
    return int(shape[-1]) if shape else module.weight.shape[0]  # pyright: ignore[reportIndexIssue, reportReturnType]


def _centred(module: nn.Module) -> bool:
    """True if the layer subtracts the mean: torch's LayerNorm, and its like with a bias."""
    if isinstance(module, nn.LayerNorm):
        return True
    return "rms" not in type(module).__name__.lower() and isinstance(getattr(module, "bias", None), Tensor)


def _local(weight: Any) -> Tensor | None:
    """This rank's part of a weight; None where there is none."""
    local = getattr(weight, "_local_tensor", weight)
    return local if isinstance(local, Tensor) else None
