"""The residual stream: what each of a model's repeated blocks hands on to the next."""

from __future__ import annotations

import random
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from monitor.record.passes.stream import (
    COUNTED,
    READ,
    STATS,
    OutputSizes,
    output_sizes,
    output_stats,
    stream_stats,
)
from monitor.record.sites._modules import ModuleSite, alike, emit_rows, named

_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


@dataclass
class _Output:
    """What one block returned, and what tells its input and its output: where they were, and who made them."""

    name: str
    given: frozenset[Any]
    returned: frozenset[Any]
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
        self._start: int | None = None  # of the rows sampled in this forward, where outputs are read together
        self._unlinked: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def choose(self, root: nn.Module, prefix: str) -> Iterable[tuple[nn.Module, str]]:
        """The children of lists that look like repeated blocks and have not turned out to be something else."""
        self._lists.clear()
        self._read.clear()
        self._start = None
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
        alone, start = _alone(output), self._start
        if alone or start is None:
            start = self._start = self._random.randrange(1 << 16)
        values = None
        if fits:
            values = np.array(stream_stats(output, start)) if alone else output_sizes(output, start)
        seen = _Output(name, _marks(inputs), _marks(output), tuple(output.shape), fits, values)
        self._read.setdefault(self._lists[name], []).append(seen)

    def forward_ends(self) -> None:
        """Keep the outputs of lists whose blocks were handed each other's."""
        for container, outputs in self._read.items():
            returned = frozenset[Any]().union(*(o.returned for o in outputs))
            links = sum(bool(o.given & returned) and not o.given & o.returned for o in outputs)
            alike = len({o.shape for o in outputs}) == 1 and all(o.fits for o in outputs)
            if not alike or len(outputs) < 2 or 2 * links < len(outputs) - 1:
                self._unlinked.add(container)
                continue
            self._values |= {o.name: o.values for o in outputs}
        self._read.clear()

    def record(self) -> None:
        """Emit the outputs of the forward that is trained on; on an accelerator, computed for all that are alike."""
        kept = {name: x for name, x in self._values.items() if isinstance(x, OutputSizes)}
        rows: dict[str, Any] = {}
        for names in alike({name: x.kind for name, x in kept.items()}):
            rows |= zip(names, output_stats([kept[n] for n in names]), strict=True)
        if kept:
            emit_rows(self.rec, "stream", STATS, {name: rows[name] for name in kept}, READ)
            counts = {name: np.array([float(x.some.shape[0])]) for name, x in kept.items()}
            emit_rows(self.rec, "stream", STATS, counts, COUNTED)
        emit_rows(self.rec, "stream", STATS, {n: x for n, x in self._values.items() if n not in kept})
        self._values.clear()

    def forget(self) -> None:
        """Drop what was never trained on, and hold no module: the model may be let go of."""
        self._values.clear()
        self._lists.clear()


def _marks(x: Tensor) -> frozenset[Any]:
    """What tells a tensor: its place in memory and, as blocks may have a device each, the node it is a copy from."""
    node: Any = x.grad_fn
    while type(node).__name__ == "ToCopyBackward0":
        node = node.next_functions[0][0]
    return frozenset((x.data_ptr(), node) if node is not None else (x.data_ptr(),))


def _alone(x: Tensor) -> bool:
    """True on a CPU, where an output is read when it is made."""
    return x.is_cpu


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
