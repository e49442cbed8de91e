"""What evaluations between two steps say of other data, where the script does not log it itself.

An evaluation is a forward of a root module in `eval()` without gradients. Its loss is taken from the model's output,
where it is in there, as in transformers' models; else from the loss function that is called with the output before
another module is. Nothing is taken of a loss that is put together in the script: a part would pass for the whole. Nor
of a number in the output that is not trained on, as a scale or a value. Nor of a forward of data that were trained on,
as in scripts that evaluate both sets.

A loss that is made in the same way of the output of a model in training mode, where that makes a difference, is counted
and not kept: it is another number than the one that was asked for.
"""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from monitor.curvature.precision import widest
from monitor.record.facts import unwrap
from monitor.record.mode import Watcher
from monitor.record.passes import loss_rows
from monitor.record.site import START, Site
from monitor.record.sites._backward import BACKWARD, losses
from monitor.record.sites._modes import Modes, averages
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
#: Logits of a batch that are looked at for its accuracy; of more, evenly spaced rows, or positions in each row.
LOOKED = 1 << 19
#: Rows of a batch, and values of a row, that tell data that were trained on again; how many rows are remembered.
ROWS, VALUES, REMEMBERED = 256, 64, 1 << 16
#: Steps between two whose rows are remembered.
MARKED = 4
#: Part of the rows looked at that must have been trained on: then the batch is of the training data.
PART = 0.125
#: What is recorded of evaluations in training mode.
STATS = ("losses", "dropouts", "norms", "evaluated")
#: Evaluated batches in a row after which no loss was seen: then nobody looks any more.
_VAIN = 50
_WEIGHTS = np.random.default_rng(0).uniform(0.5, 1.5, VALUES)


class EvaluationSite(Site):
    """Means of the loss and of the accuracy over what was evaluated since the last step: ``eval_loss``, ``eval_acc``.

    Over targets, or over batches where the model makes the loss. Targets that are ignored do not count.
    """

    name = "evaluation"
    looks = True

    def __init__(self, recorder: Any) -> None:
        super().__init__(recorder)
        self._means: dict[str, tuple[Any, Any]] = {}  # sum and weight of each quantity
        self._trained: list[weakref.ref[Tensor]] = []  # inputs of the last training forward
        self._given: dict[StorageWeakRef, int] = {}  # where the numbers of the last output lie, and how often written
        self._criteria: set[str] = set()  # what was trained on
        self._made: list[Any] = []  # nodes of the numbers in the output of the last training forward
        self._makes_loss = False  # one of them was trained on
        self._vain = 0
        self._rows: dict[float, None] = {}  # what tells rows that were trained on, the oldest first
        self._modes = Modes()
        self._unready: tuple[int, int] | None = None  # dropouts and normalisations in training mode of the last output
        self._vain_unready = 0
        self._losses = self._evaluated = 0  # since the last row: losses of such outputs, forwards in evaluation mode
        self._on = (0, 0)  # what was in training mode then
        self._tried: set[float] = set()  # what tells their rows
        self._trying: list[float] = []

    def before(self) -> dict[Any, Watcher]:
        """Look at what is trained on."""
        return dict.fromkeys(BACKWARD, self._backward)

    def after(self) -> dict[Any, Watcher]:
        """Watch the losses of torch."""
        return {func: partial(self._called, func) for func in _LOSSES}

    def _backward(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if self.rec.rows >= START:
            return
        for loss in losses(args, kwargs):
            nodes = _scaled(loss)
            self._criteria.add(_criterion(nodes[-1]))
            self._makes_loss |= any(node is made for node in nodes for made in self._made)
        self._made.clear()

    def on_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The evaluation is over; remember what is trained on, for as long as it lives."""
        self._given.clear()
        inputs = (*args, *kwargs.values())
        self._trained = [weakref.ref(x) for x in inputs if isinstance(x, Tensor)]
        if self._tried:
            if not self._tried.isdisjoint(self._marks(inputs)):
                self._losses = 0  # they have chosen what to train on
            self._tried.clear()
        if self.due(MARKED):
            self._rows.update(dict.fromkeys(self._marks(inputs)))
            for oldest in list(islice(self._rows, max(0, len(self._rows) - REMEMBERED))):
                del self._rows[oldest]

    def on_output(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Remember which numbers the model made, until it is known whether they are trained on."""
        if self.rec.rows < START:
            self._made = [x.grad_fn for x in _numbers(output) if x.grad_fn is not None]

    def on_evaluation(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Keep the loss that the model gave back, or look for one that is made of its output."""
        self._unready = None
        if module.training:
            self._unready = self._in_training(module)
            if self._unready is None:
                return
        else:
            self._evaluated += 1
        inputs = (*args, *kwargs.values())
        if _same(inputs) & _same(ref() for ref in self._trained):
            return
        marks = self._marks(inputs)
        if sum(m in self._rows for m in marks) > PART * len(marks):
            return  # the training data once more, as in scripts that evaluate both
        self._trying = marks
        # before the first backward anything may be what will be trained on
        loss = next(_numbers(output), None) if self._makes_loss or not self._criteria else None
        if loss is not None:
            if self._unready is not None:
                self._count()
            else:
                self._add("loss", loss, 1.0)
            return
        if self._unready is not None:
            self._vain_unready += 1
        else:
            self._vain += 1
        # before the first step a model that has been tried may yet be compiled
        if self._vain <= _VAIN and self.rec.rows > 0 and self.rec.stack.look():
            self._given = _places(tree_leaves(output))

    def _in_training(self, module: nn.Module) -> tuple[int, int] | None:
        """How many dropouts and normalisations of ``module`` are in training mode; None if it is of no interest."""
        if self.rec.rows == 0 or self._vain_unready > _VAIN:
            return None
        norms = [averages(m) for m in self._modes.inside(unwrap(module)) if m.training]
        return (len(norms) - sum(norms), sum(norms)) if norms else None

    def _count(self) -> None:
        """A loss was made of the last output, which was given in training mode."""
        assert self._unready is not None
        self._vain_unready = 0
        self._losses += 1
        self._on = self._unready
        self._tried.update(self._trying)

    def _marks(self, inputs: Iterable[Any]) -> list[float]:
        """A number for each row of the tensor that tells most of them apart, the same for the same row; on a CPU alone.

        A mask does not: the rows of other data have the same.
        """
        if not self.rec.on_cpu:
            return []
        rows = (x for x in _plain(inputs) if x.dim() > 1 and len(x) > 1 and x.is_cpu and not x.is_complex())
        return max(map(_marks, rows), key=lambda marks: len(set(marks)), default=[])

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if not self._given:
            return
        given = _SIGNATURES[func].bind(*args, **kwargs).arguments
        z, y = given["input"], given["target"]
        # neither of an output that was written over, nor one that is trained on, as a probe's
        if not _places((z,)).items() & self._given.items() or result.requires_grad:
            return
        self._given.clear()
        if self._unready is not None:
            self._count()
            return
        self._vain = 0  # the first is the loss, what comes then is beside it
        count: Any = z.numel()
        if func in _CLASSIFIES and not y.is_floating_point():
            valid = y != given.get("ignore_index", -100)
            count = int(valid.sum()) if self.rec.on_cpu else valid.sum()
            self._judge(z if z.dim() > 1 else z[None], y if z.dim() > 1 else y[None], valid)
            if (weight := given.get("weight")) is not None:  # a mean is over the weights of the targets
                count = (weight[torch.where(valid, y, 0).long()] * valid).sum()
                count = float(count) if self.rec.on_cpu else count
            if result.dim() > 0:  # of ignored targets it is 0, which a mean would count
                result = result.sum()
                given["reduction"] = "sum"
        summed = given.get("reduction", "mean") == "sum" or given.get("size_average") is False
        # another loss than that of the training is none, and of a sum of weighted ones the weights are not known
        if self._criteria == {_LOSSES[func]} and not (summed and given.get("weight") is not None):
            self._add("loss", result.sum() if summed else result.mean(), count, summed=summed)

    def _judge(self, z: Tensor, y: Tensor, valid: Tensor) -> None:
        """Count the targets whose logit is the largest of its row, ``(row, class, …)``; of many logits some."""
        if z.shape[1] < 2:
            return
        valid = valid.view(y.shape)
        positions = range(2, z.dim()) or range(1)
        every = slice(None, None, max(1, math.ceil((z.numel() / LOOKED) ** (1 / len(positions)))))
        for axis in positions:
            z, (y, valid) = _along(z, axis, every), (_along(x, max(axis - 1, 0), every) for x in (y, valid))
        count = int(valid.sum()) if self.rec.on_cpu else valid.sum()
        self._add("acc", loss_rows.right(z, y.long(), valid), count, summed=True)

    def _add(self, kind: str, value: Tensor, weight: Any, summed: bool = False) -> None:
        x: Any
        if self.rec.on_cpu:
            x = value.item()
            if not summed:  # the mean over no target is not a number
                x = x * weight if weight > 0 else 0.0
        else:
            x = value.detach().to(widest(value.device)).reshape(())
            if not summed:
                x = x * weight
                x = x.masked_fill(weight <= 0, 0) if isinstance(weight, Tensor) else x if weight > 0 else 0.0
        total, weights = self._means.get(kind, (0.0, 0.0))
        self._means[kind] = total + _beside(x, total), weights + _beside(weight, weights)

    def waiting(self) -> bool:
        """True if the model was evaluated after its last step."""
        return bool(self._means or self._losses) and self.rec.rows > 0

    def on_row(self) -> None:
        """Hand on what was evaluated since the last row."""
        if self._losses:
            self.rec.emit(
                "evaluation_mode", STATS, "", (float(self._losses), *map(float, (*self._on, self._evaluated)))
            )
        self._losses = self._evaluated = 0
        self._made.clear()
        if self.rec.rows == 0 and self._criteria and not self._makes_loss:
            self._means.pop("loss", None)
        if self._means:
            logged = next(s for s in self.rec.sites if isinstance(s, LoggedSite))
            for kind, (total, weight) in self._means.items():
                if isinstance(weight, Tensor) or weight > 0:
                    logged.evaluated(kind, total / weight)
            self._means.clear()


def _beside(x: Any, y: Any) -> Any:
    """``x`` where ``y`` is: batches may be evaluated on several accelerators."""
    return x.to(y.device, non_blocking=True) if isinstance(x, Tensor) and isinstance(y, Tensor) else x


def _along(x: Tensor, axis: int, part: slice) -> Tensor:
    return x[(slice(None),) * axis + (part,)]


def _numbers(output: Any) -> Iterator[Tensor]:
    """The numbers in a model's output that may be a loss: the output itself, its ``loss``, or those in a tuple."""
    if isinstance(output, tuple | list):
        given = output
    elif isinstance(output, Mapping):
        given = [output.get("loss")]
    else:  # what a property would compute is none of ours
        given = [getattr(output, "__dict__", {}).get("loss", output)]
    return (x for x in given if isinstance(x, Tensor) and x.dim() == 0 and x.is_floating_point())


def _scaled(loss: Any) -> list[Any]:
    """The nodes of ``loss``, from the last one back to the one that makes it up to a factor; that may be None."""
    nodes = [getattr(loss, "grad_fn", None)]
    while nodes[-1] is not None and type(nodes[-1]).__name__ in _SCALES and len(nodes) <= 8:
        before = [n for n, _ in nodes[-1].next_functions if n is not None]
        if len(before) != 1:
            break
        nodes.append(before[0])
    return nodes


def _criterion(node: Any) -> str:
    """Which of `_LOSSES` leaves this node; its own name if it is none of them."""
    name = type(node).__name__
    return next((known for known in _LOSSES.values() if name.startswith(known)), name)


def _marks(x: Tensor) -> list[float]:
    rows = x[:: -(-len(x) // ROWS)].flatten(1)
    some = rows[:, :: -(-rows.shape[1] // VALUES)].double().numpy()
    return (some * _WEIGHTS[: some.shape[1]]).sum(1).tolist()


def _plain(values: Iterable[Any]) -> Iterable[Tensor]:
    return (
        x
        for x in values
        if type(x) in (Tensor, nn.Parameter)
        and x.layout is torch.strided
        and not (x.is_nested or x.is_meta or x.is_quantized)
        and x.numel() > 0
    )


def _places(values: Iterable[Any]) -> dict[StorageWeakRef, int]:
    """The memory of the tensors among ``values``, the same for what is only a view of another, and its version."""
    return {
        StorageWeakRef(x.untyped_storage()): -1 if x.is_inference() else x._version  # memory that is free is another
        for x in _plain(values)
    }


def _same(values: Iterable[Any]) -> set[tuple[Any, ...]]:
    """Which numbers the tensors among ``values`` are: not the same for two parts of one data set."""
    return {(x.data_ptr(), x.shape) for x in _plain(values)}
