"""Where a parameter is, without keeping it: the module that holds it, and its name there.

A weak reference to the parameter would do, but one that has any cannot be exchanged for another, which is how torch
moves and converts what is sharded.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Held:
    """A parameter, looked up where its module holds it when it is asked for."""

    module: weakref.ref[nn.Module]
    key: str

    @property
    def parameter(self) -> Tensor | None:
        """What the module holds now; None if it is gone."""
        module = self.module()
        return None if module is None else module._parameters.get(self.key)


def held(models: Iterable[nn.Module]) -> Iterator[tuple[Tensor, Held]]:
    """Every parameter of ``models``, and where it is."""
    for model in models:
        for m in model.modules():
            for key, p in m._parameters.items():
                if p is not None:
                    yield p, Held(weakref.ref(m), key)
