"""Normalisation layers over features: LayerNorm, RMSNorm and those that models write themselves."""

from __future__ import annotations

import re
import weakref
from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np
from torch import Tensor, nn

from monitor.record.passes.norm import (
    COUNTS,
    GAIN,
    INPUT,
    SIZES,
    STATS,
    InputSizes,
    gain_offset,
    gain_stats,
    gains_stats,
    input_stats,
    norm_sizes,
    norm_stats,
)
from monitor.record.sites._modules import ModuleSite, alike, emit_rows, named

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
        offset = self._offsets.get(module)
        if offset is None or (isinstance(offset, Tensor) and offset.device != inputs.device):
            own = type(module) in _TORCH or weight is None or weight.numel() != features
            some = slice(0, _TOKENS)
            x, y = inputs.reshape(-1, features)[some], output.reshape(-1, features)[some]
            bias = getattr(module, "bias", None)
            bias = bias if isinstance(bias, Tensor) else None
            self._offsets[module] = 0.0 if own or weight is None else gain_offset(x, y, weight, bias)
        alone = _alone(inputs)
        self._inputs[name] = norm_stats(inputs, _centred(module)) if alone else norm_sizes(inputs, _centred(module))
        if weight is not None:
            # a copy: where parameters are sharded, the weight is gone when its layer has run
            self._gains[name] = (
                gain_stats(weight, self._offsets[module]) if alone else (weight.detach().clone(), self._offsets[module])
            )

    def record(self) -> None:
        """Emit what the forward that is trained on had; on an accelerator, computed for all layers that are alike."""
        inputs = {name: kept for name, kept in self._inputs.items() if isinstance(kept, InputSizes)}
        gains = {name: kept for name, kept in self._gains.items() if isinstance(kept, tuple)}
        rows: dict[str, Any] = {}
        for names in alike({name: kept.kind for name, kept in inputs.items()}):
            rows |= zip(names, input_stats([inputs[n] for n in names]), strict=True)
        if inputs:
            emit_rows(self.rec, "norm", STATS, {name: rows[name] for name in inputs}, SIZES)
            counts = {name: np.array(kept.counts, np.float64) for name, kept in inputs.items()}
            emit_rows(self.rec, "norm", STATS, counts, COUNTS)
        rows.clear()
        for names in alike({name: _kind(*kept) for name, kept in gains.items()}):
            weights, offsets = zip(*(gains[n] for n in names), strict=True)
            added = [x for x in offsets if isinstance(x, Tensor)]
            rows |= zip(names, gains_stats(weights, added), strict=True)
        emit_rows(self.rec, "norm", STATS, {name: rows[name] for name in gains}, GAIN)
        emit_rows(self.rec, "norm", STATS, {n: x for n, x in self._inputs.items() if n not in inputs}, INPUT)
        emit_rows(self.rec, "norm", STATS, {n: x for n, x in self._gains.items() if n not in gains}, GAIN)
        self.forget()

    def forget(self) -> None:
        """Drop what was never trained on."""
        self._inputs.clear()
        self._gains.clear()


_TORCH: tuple[type[nn.Module], ...] = (nn.LayerNorm, nn.RMSNorm)


def _alone(x: Tensor) -> bool:
    """True on a CPU, where a layer is read when it is called."""
    return x.is_cpu


def _kind(weight: Tensor, offset: Tensor | float) -> Hashable:
    """Weights of one kind can be read together."""
    return weight.device, weight.dtype, weight.shape, isinstance(offset, Tensor)


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
