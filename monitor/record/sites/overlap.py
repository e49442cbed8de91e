"""Parameters that two optimizers change with one and the same gradient."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from monitor.record.passes.gradient_reuse import Sample, same, sample
from monitor.record.site import Site

#: Steps between two looks.
EVERY = 29
#: Of the parameters that two optimizers have in common, those that are looked at.
MOST = 3
STATS = ("shared", "twice")


@dataclass
class _Made:
    """An update of this step: parameters that another optimizer has too, with their gradients and values after it."""

    by: Optimizer
    params: list[Tensor]
    grads: Sample
    values: Sample


class OverlapSite(Site):
    """Looks at what optimizers have in common: is the gradient the same bit for bit when the second one uses it too?

    Nothing is read where no two optimizers share a parameter. One that works through another, as a wrapper does, is no
    second one.
    """

    name = "optimizer_overlap"

    def __init__(self, recorder: Any) -> None:
        super().__init__(recorder)
        self._made: list[_Made] = []
        self._shared: set[int] | None = None  # ids of parameters that more than one optimizer has; None: not known yet

    def listens(self, step: int) -> bool:
        """True if it is time."""
        return self.due(EVERY, step)

    def on_step(self, optimizer: Optimizer) -> None:
        """Compare with the updates of this step so far, and keep this one for those that follow."""
        if self._shared is None:
            counts = Counter(id(p) for o in self.rec.optimizers for p in _parameters(o))
            self._shared = {key for key, number in counts.items() if number > 1}
        if not self._shared:
            return
        mine = [p for p in _parameters(optimizer) if id(p) in self._shared]
        ids = {id(p) for p in mine}
        for made in self._made:
            if all(id(p) in ids for p in made.params) and not _holds(made.by, optimizer):
                self._compare(optimizer, made, len(ids.intersection(map(id, _parameters(made.by)))))
                break
        params = [p for p in mine if _local(p.grad) is not None][:MOST]
        read = _read(params)
        if read is not None:
            self._made.append(_Made(optimizer, params, *read))

    def _compare(self, optimizer: Optimizer, made: _Made, shared: int) -> None:
        read = _read(made.params)
        if read is None:
            return
        grads, values = read
        again, still = same(grads, made.grads), same(values, made.values)
        label = self.rec.label(optimizer)
        if isinstance(again, Tensor) or isinstance(still, Tensor):
            twice = torch.as_tensor(again) & ~torch.as_tensor(still)
            number = torch.full_like(twice, shared, dtype=torch.float32)
            self.rec.emit(self.name, STATS, label, torch.stack((number, twice.float())))
        else:
            self.rec.emit(self.name, STATS, label, (float(shared), float(again and not still)))

    def on_row(self) -> None:
        """Keep nothing beyond the step."""
        self._made.clear()
        self._shared = None


def _parameters(optimizer: Optimizer) -> Iterable[Tensor]:
    return (p for group in optimizer.param_groups for p in group["params"])


def _holds(a: Optimizer, b: Optimizer) -> bool:
    """True if one of two optimizers is a part of the other, or shares its groups."""
    inside = any(v is y for x, y in ((a, b), (b, a)) for v in vars(x).values())
    return inside or a.state is b.state or any(g is h for g in a.param_groups for h in b.param_groups)


def _local(t: Tensor | None) -> Tensor | None:
    """This rank's values of a tensor, if they are plain numbers that lie one after another."""
    t = getattr(t, "_local_tensor", t)
    if not isinstance(t, Tensor) or t.layout is not torch.strided:
        return None
    return t if t.is_contiguous() and t.is_floating_point() and t.numel() else None


def _read(params: Iterable[Tensor]) -> tuple[Sample, Sample] | None:
    """Samples of the gradients and values; None without parameters, or if one of them cannot be read."""
    found = [(_local(p.grad), _local(p)) for p in params]
    grads, values = [g for g, _ in found if g is not None], [v.detach() for _, v in found if v is not None]
    if not found or len(grads) < len(found) or len(values) < len(found) or len({t.device for t in grads}) > 1:
        return None
    return sample(grads), sample(values)
