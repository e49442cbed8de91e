"""The residual stream: what each of a model's repeated blocks hands on to the next."""

from __future__ import annotations

import random
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from monitor.record.passes.stream import STATS, stream_stats
from monitor.record.sites._modules import ModuleSite, named

_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


@dataclass
class _Output:
    """What one block returned, and where in memory its input and its output were."""

    name: str
    given: int
    returned: int
    shape: tuple[int, ...]
    fits: bool
    values: Any


class StreamSite(ModuleSite):
    """Statistics of the output of every repeated block, every fiftieth step and at a few early ones.

    Repeated blocks are children of one list that have the same class and at least two layers with parameters each,
    and of which each is handed what an earlier one returned. Experts of a mixture are no such blocks, nor are heads.
    """

    name, metric = "stream", "residual_stream"

    def __init__(self, recorder: Any) -> None:
        super().__init__(recorder)
        self._lists: dict[str, nn.Module] = {}
        self._read: dict[nn.Module, list[_Output]] = {}
        self._values: dict[str, Any] = {}
        self._random = random.Random(0)
        self._unlinked: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def choose(self, root: nn.Module, prefix: str) -> Iterable[tuple[nn.Module, str]]:
        """The children of lists that look like repeated blocks and have not turned out to be something else."""
        self._lists.clear()
        self._read.clear()
        for name, container in named(root, prefix):
            if not isinstance(container, _CONTAINERS) or container in self._unlinked:
                continue
            for place, block in _blocks(container):
                full = f"{name}.{place}" if name else place
                self._lists[full] = container
                yield block, full

    def read(self, module: nn.Module, name: str, inputs: Tensor, output: Tensor) -> None:
        """Read an output, and remember what it was made from."""
        fits = output.dim() in (2, 3) and inputs.shape == output.shape
        start = self._random.randrange(1 << 16)
        values = stream_stats(output, start) if fits else None
        seen = _Output(name, inputs.data_ptr(), output.data_ptr(), tuple(output.shape), fits, values)
        self._read.setdefault(self._lists[name], []).append(seen)

    def forward_ends(self) -> None:
        """Keep the outputs of lists whose blocks were handed each other's."""
        for container, outputs in self._read.items():
            returned = {o.returned for o in outputs}
            links = sum(o.given in returned and o.given != o.returned for o in outputs)
            alike = len({o.shape for o in outputs}) == 1 and all(o.fits for o in outputs)
            if not alike or len(outputs) < 2 or 2 * links < len(outputs) - 1:
                self._unlinked.add(container)
                continue
            self._values |= {o.name: o.values for o in outputs}
        self._read.clear()

    def record(self) -> None:
        """Emit the outputs of the forward that is trained on."""
        if self._values:
            rows = list(self._values.values())
            device = self.rec.device
            joined = (
                torch.stack([r.to(device) for r in rows]) if isinstance(rows[0], Tensor) else np.array(rows, np.float64)
            )
            self.rec.emit_many("stream", STATS, list(self._values), joined)
            self._values.clear()

    def forget(self) -> None:
        """Drop what was never trained on, and hold no module: the model may be let go of."""
        self._values.clear()
        self._lists.clear()


def _blocks(container: nn.Module) -> list[tuple[str, nn.Module]]:
    """Children that have a class in common and are made of several layers, in order."""
    kinds: dict[type[nn.Module], list[tuple[str, nn.Module]]] = {}
    for name, child in container.named_children():
        kinds.setdefault(type(child), []).append((name, child))
    return [
        pair
        for members in kinds.values()
        if len(members) > 1 and sum(1 for m in members[0][1].modules() if m._parameters) > 1
        for pair in members
    ]
