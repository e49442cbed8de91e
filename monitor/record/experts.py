"""Where a router stands in its model, and the parameters of the experts it chooses among.

Experts are looked for round the module that holds the router's weight, nearest first: modules in a list, all of the
same shapes, or fused parameters with an axis of as many entries as the router has scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from monitor.record.held import Held, held

#: Levels above the module that holds a router's weight.
_LEVELS = 2

#: A parameter of all experts: fused, ``(expert, …)``, or one tensor for each.
Part = Tensor | list[Tensor]


@dataclass
class Router:
    """A router that was found, by its weight; keeps nothing alive.

    Attributes:
        name: of the module that holds the weight.
        experts: number of its scores.
        rows: True if its weight is ``(expert, feature)``, False if it is ``(feature, expert)``.
        k: experts of a token.
    """

    name: str
    experts: int
    rows: bool
    k: int
    _weight: Held | None

    @staticmethod
    def of(roots: Sequence[nn.Module], name: str, weight: Tensor, rows: bool, k: int) -> Router:
        """The router called ``name`` with this weight, a parameter of ``roots``, which chooses ``k`` experts."""
        place = next((place for p, place in held(roots) if p is weight), None)
        return Router(name, weight.shape[0 if rows else 1], rows, k, place)

    @property
    def weight(self) -> Tensor | None:
        """``(expert, feature)``, detached; None if the parameter is gone."""
        w = None if self._weight is None else self._weight.parameter
        return None if w is None else w.detach() if self.rows else w.detach().T

    def lineage(self, roots: Sequence[nn.Module]) -> list[nn.Module]:
        """The module that holds the weight, then up to two modules above it; empty if the parameter is gone."""
        holder = None if self._weight is None else self._weight.module()
        for root in roots:
            for name, m in root.named_modules():
                if m is holder:
                    parts = name.split(".") if name else []
                    kept = range(len(parts), max(-1, len(parts) - _LEVELS - 1), -1)
                    return [root.get_submodule(".".join(parts[:n])) for n in kept]
        return []

    def parts(self, roots: Sequence[nn.Module]) -> list[Part]:
        """The parameters of its experts, detached; empty if they are unknown."""
        lineage = self.lineage(roots)
        for m in lineage[1:]:
            found = _in_list(m, self.experts) or list(_fused(m, self.experts, lineage[0]))
            if found:
                return found
        return []


def spread(parts: Sequence[Part]) -> str | None:
    """Over what the parameters of experts are spread, so that they cannot be compared; None if they can."""
    each = [p for part in parts for p in ([part] if isinstance(part, Tensor) else part)]
    if any(hasattr(p, "_local_tensor") for p in each):
        return "several processes"
    return "several devices" if len({p.device for p in each}) > 1 else None


def _in_list(module: nn.Module, experts: int) -> list[Part]:
    for m in module.modules():
        children = list(m.children())
        if len(children) == experts and not m._parameters:
            each = [[p.detach() for p in child.parameters()] for child in children]
            shapes = [[p.shape for p in parameters] for parameters in each]
            if shapes[0] and all(s == shapes[0] for s in shapes):
                return [list(p) for p in zip(*each, strict=True)]
    return []


def _fused(module: nn.Module, experts: int, router: nn.Module) -> Iterator[Part]:
    for m in module.modules():
        if m is not router and not isinstance(m, _ConvNd):
            for p in m._parameters.values():
                if p is not None and p.dim() == 3 and p.shape[0] == experts:
                    yield p.detach()
