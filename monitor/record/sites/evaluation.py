"""What evaluations between two steps say of other data, where the script does not log it itself.

An evaluation is a forward of a root module in `eval()` without gradients. Its loss is taken from the model's output,
where it is in there, as in transformers' models; else from the loss function that is called with the output before
another module is. Nothing is taken of a loss that is put together in the script: a part would pass for the whole. Nor
of a forward of data that were trained on, as in scripts that evaluate both sets.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from monitor.record.mode import Watcher
from monitor.record.site import START, Site
from monitor.record.sites.logged import LoggedSite

#: Loss functions, and the beginning of the name of the node that each leaves in the autograd graph.
_LOSSES: dict[Any, str] = {
    F.cross_entropy: "NllLoss",
    F.nll_loss: "NllLoss",
    F.mse_loss: "MseLoss",
    F.binary_cross_entropy: "BinaryCrossEntropyBackward",
    F.binary_cross_entropy_with_logits: "BinaryCrossEntropyWithLogits",
    F.smooth_l1_loss: "SmoothL1Loss",
    F.huber_loss: "HuberLoss",
}
_SIGNATURES = {func: inspect.signature(func) for func in _LOSSES}
_CLASSIFIES = (F.cross_entropy, F.nll_loss)
#: Nodes that leave of a loss what it is: a mean of it, a factor, another precision.
_SCALES = ("MulBackward0", "DivBackward0", "MeanBackward0", "SumBackward0", "ToCopyBackward0", "ViewBackward0")
#: Logits of a batch that are looked at for its accuracy; of more, evenly spaced rows.
LOOKED = 1 << 19
#: Rows of a batch, and values of a row, that tell data that were trained on again; how many rows are remembered.
ROWS, VALUES, REMEMBERED = 256, 64, 1 << 16
#: Part of the rows looked at that must have been trained on: then the batch is of the training data.
PART = 0.125
#: Evaluated batches in a row after which no loss was seen: then nobody looks any more.
_VAIN = 50
_WEIGHTS = np.random.default_rng(0).uniform(0.5, 1.5, VALUES)


class EvaluationSite(Site):
    """Means of the loss and of the accuracy over what was evaluated since the last step: ``eval_loss``, ``eval_acc``.

    Over targets, or over batches where the model makes the loss. Ties count as right, targets that are ignored not.
    """

    name = "evaluation"

    def __init__(self, recorder: Any) -> None:
        super().__init__(recorder)
        self._means: dict[str, tuple[Any, Any]] = {}  # sum and weight of each quantity
        self._trained: list[weakref.ref[Tensor]] = []  # inputs of the last training forward
        self._given: set[int] = set()  # where the numbers of the last output lie
        self._criteria: set[str] = set()  # what was trained on
        self._vain = 0
        self._rows: dict[float, None] = {}  # what tells rows that were trained on, the oldest first

    def before(self) -> dict[Any, Watcher]:
        """Look at what is trained on."""
        return {torch.Tensor.backward: self._backward, torch.autograd.backward: self._backward}

    def after(self) -> dict[Any, Watcher]:
        """Watch the losses of torch."""
        return {func: partial(self._called, func) for func in _LOSSES}

    def _backward(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if self.rec.rows >= START:
            return
        given = args[0] if args else kwargs.get("tensors")
        for loss in [given] if isinstance(given, Tensor) else list(given or ()):
            self._criteria.add(_criterion(loss))

    def on_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The evaluation is over; remember what is trained on, for as long as it lives."""
        self._given.clear()
        self._trained = [weakref.ref(x) for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        self._rows.update(dict.fromkeys(self._marks((*args, *kwargs.values()))))
        for oldest in list(islice(self._rows, max(0, len(self._rows) - REMEMBERED))):
            del self._rows[oldest]

    def on_evaluation(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Keep the loss that the model gave back, or look for one that is made of its output."""
        if _same((*args, *kwargs.values())) & _same(ref() for ref in self._trained):
            return
        marks = self._marks((*args, *kwargs.values()))
        if sum(m in self._rows for m in marks) > PART * len(marks):
            return  # the training data once more, as in scripts that evaluate both
        loss = _loss(output)
        if loss is not None:
            self._add("loss", loss, 1.0)
            return
        self._vain += 1
        if self._vain <= _VAIN and self.rec.watch_until_a_module_is_called():
            self._given = _places(tree_leaves(output))

    def _marks(self, given: Iterable[Any]) -> list[float]:
        """A number for each row of the first tensor of some rows, the same for the same row; on a CPU alone."""
        x = next((x for x in _plain(given) if x.dim() > 1 and len(x) > 1), None)
        if x is None or not self.rec.on_cpu or x.is_complex():
            return []
        rows = x[:: -(-len(x) // ROWS)].reshape(-(-len(x) // -(-len(x) // ROWS)), -1)
        some = rows[:, :: -(-rows.shape[1] // VALUES)].double().numpy()
        return (some * _WEIGHTS[: some.shape[1]]).sum(1).tolist()

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if not self._given:
            return
        given = _SIGNATURES[func].bind(*args, **kwargs).arguments
        z, y = given["input"], given["target"]
        if not _places((z,)) & self._given:
            return
        self._given.clear()
        self._vain = 0  # the first is the loss, what comes then is beside it
        count: Any = z.numel()
        if func in _CLASSIFIES and not y.is_floating_point():
            valid = y != given.get("ignore_index", -100)
            count = int(valid.sum()) if self.rec.on_cpu else valid.sum()
            self._judge(z if z.dim() > 1 else z[None], y if z.dim() > 1 else y[None], valid)
        summed = given.get("reduction", "mean") == "sum" or given.get("size_average") is False
        # another loss than that of the training is none, and of a sum of weighted ones the weights are not known
        if self._criteria == {_LOSSES[func]} and not (summed and given.get("weight") is not None):
            self._add("loss", result.sum() if summed else result.mean(), count, summed=summed)

    def _judge(self, z: Tensor, y: Tensor, valid: Tensor) -> None:
        """Count the targets whose logit is the largest of its row, ``(row, class, …)``; of many logits in some rows."""
        if z.shape[1] < 2:
            return
        rows = slice(None, None, -(-z.numel() // LOOKED) if z.dim() == 2 else 1)
        z, y, valid = z[rows], y[rows], valid.view(y.shape)[rows]
        of_target = z.gather(1, torch.where(valid, y, 0).unsqueeze(1)).squeeze(1)
        count = int(valid.sum()) if self.rec.on_cpu else valid.sum()
        self._add("acc", ((of_target >= z.amax(1)) & valid).sum(), count, summed=True)

    def _add(self, kind: str, value: Tensor, weight: Any, summed: bool = False) -> None:
        x = value.item() if self.rec.on_cpu else value.detach().double().reshape(())
        if not summed:  # the mean over no target is not a number
            x = (
                torch.where(weight > 0, x * weight, 0.0)
                if isinstance(weight, Tensor)
                else x * weight
                if weight
                else 0.0
            )
        total, weights = self._means.get(kind, (0.0, 0.0))
        self._means[kind] = total + x, weights + weight

    def waiting(self) -> bool:
        """True if the model was evaluated after its last step."""
        return bool(self._means)

    def on_row(self) -> None:
        """Hand on what was evaluated since the last row."""
        if self._means:
            logged = next(s for s in self.rec.sites if isinstance(s, LoggedSite))
            for kind, (total, weight) in self._means.items():
                if isinstance(weight, Tensor) or weight > 0:
                    logged.evaluated(kind, total / weight)
            self._means.clear()


def _loss(output: Any) -> Tensor | None:
    """The one number in a model's output that is a loss: the output itself, its ``loss``, or in a tuple the first."""
    if isinstance(output, tuple | list):
        given = output
    else:
        given = [output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)]
    numbers = (x for x in given if isinstance(x, Tensor))
    return next((x for x in numbers if x.dim() == 0 and x.is_floating_point()), None)


def _criterion(loss: Tensor) -> str:
    """Which of `_LOSSES` alone ``loss`` is, up to a factor; the name of another node if it is none of them."""
    node = loss.grad_fn
    for _ in range(8):
        before = [n for n, _ in node.next_functions if n is not None] if node is not None else []
        if node is None or type(node).__name__ not in _SCALES or len(before) != 1:
            break
        node = before[0]
    name = type(node).__name__
    return next((known for known in _LOSSES.values() if name.startswith(known)), name)


def _plain(values: Iterable[Any]) -> Iterable[Tensor]:
    return (x for x in values if type(x) in (Tensor, nn.Parameter) and x.layout is torch.strided and x.numel() > 0)


def _places(values: Iterable[Any]) -> set[int]:
    """Where the memory of the tensors among ``values`` begins: the same for what is only a view of another."""
    return {x.untyped_storage().data_ptr() for x in _plain(values)}


def _same(values: Iterable[Any]) -> set[tuple[Any, ...]]:
    """Which numbers the tensors among ``values`` are: not the same for two parts of one data set."""
    return {(x.data_ptr(), x.shape) for x in _plain(values)}
