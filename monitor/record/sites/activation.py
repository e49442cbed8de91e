"""Where a non-finite loss was born: the earliest operation of the forward pass whose result is not finite.

The autograd graph of the loss still holds what the operations saved for backward. When a loss is NaN or infinite, and
only then, the graph is walked in the order of execution and the first non-finite value names the place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from monitor.record.mode import Watcher
from monitor.record.private import saved, saved_tensor_hooks_active
from monitor.record.site import Site

STATS = ("count",)
#: Losses that are looked into; once the parameters are NaN, everything is.
_MOST = 3
_SAVED = ("result", "self", "input", "mat1", "mat2", "other", "vec1", "grad_input", "tensor1", "tensor2")


class ActivationSite(Site):
    """Names the operation in which a value stopped being finite, under the module whose parameter comes before it.

    Only where reading the loss costs no sync: on an accelerator the earliest of input, logits, loss and gradient has
    to do.
    """

    name = "activation"

    def __init__(self, recorder: Any) -> None:
        super().__init__(recorder)
        self._looked = 0

    def before(self) -> dict[Any, Watcher]:
        """Look at a loss before backward frees its graph."""
        return {torch.Tensor.backward: self._backward}

    def _backward(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        loss = args[0]
        if not loss.is_cpu or loss.numel() != 1 or self._looked >= _MOST or math.isfinite(loss.item()):
            return
        self._looked += 1
        if saved_tensor_hooks_active():
            return
        place, count = self._born(loss)
        if count:
            self.rec.emit("birthplace", STATS, place, (float(count),))

    def _born(self, loss: Tensor) -> tuple[str, int]:
        """``(module (operation), non-finite elements)`` of the earliest non-finite value, or ``("", 0)``."""
        where, before = "", "the beginning"
        for node in _in_order(loss.grad_fn):
            operation = type(node).__name__.removesuffix("0").removesuffix("Backward")
            if operation == "T":  # a transposed weight, made before the input it will meet
                continue
            parameters = list(_parameters(node))
            own = {p.data_ptr() for p in parameters}
            for name in _SAVED:
                value = saved(node, name)
                if value is None or not value.is_floating_point() or value.data_ptr() in own:
                    continue
                bad = int((~torch.isfinite(value)).sum())
                if bad:
                    # its result an operation has made itself; what it was given, the one before
                    return f"{where or 'input'} ({operation if name == 'result' else before})", bad
            names = [self.rec.parameter(p) for p in parameters]
            if names:
                where = names[-1].rpartition(".")[0]
            before = operation
        return "", 0


def _in_order(root: Any) -> Iterable[Any]:
    """All nodes below ``root`` in the order in which the forward pass made them."""
    seen, todo = set(), [root]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo.extend(n for n, _ in node.next_functions)
    return sorted((n for n in seen if type(n).__name__ != "AccumulateGrad"), key=lambda n: n._sequence_nr())


def _parameters(node: Any) -> Iterable[Tensor]:
    """Parameters that ``node`` reads directly or transposed."""
    for n, _ in node.next_functions:
        if type(n).__name__ == "TBackward0":
            n = n.next_functions[0][0]
        if type(n).__name__ == "AccumulateGrad":
            yield n.variable
