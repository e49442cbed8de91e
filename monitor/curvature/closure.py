"""The loss of fixed data as a deterministic function of a model's parameters.

Everything in this package is a function of a `LossClosure`. It never differentiates the parameters themselves: inside a
session the modules hold stand-ins, fresh leaves that share the parameters' memory, so that no ``.grad``, hook or
``requires_grad`` flag of the training run is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map

from monitor.curvature.environment import Mode, RandomState, undisturbed
from monitor.curvature.precision import double, widest
from monitor.errors import UsageError

#: What a caller may use to select parameters: names of parameters or of modules (all they own); None: all trainable.
Selection = str | Iterable[str] | None


@dataclass(frozen=True)
class Batch:
    """One piece of the data: how to get the model's outputs from it and a number from the outputs."""

    outputs: Callable[[], Any]
    loss: Callable[..., Any]
    targets: Any = None
    has_targets: bool = False
    weight: float = 1.0
    size: int | None = None

    def loss_of(self, outputs: Any) -> Tensor:
        """The loss ``()`` of these outputs.

        Raises:
            UsageError: if the loss function gives anything but one real number.
        """
        value = self.loss(outputs, self.targets) if self.has_targets else self.loss(outputs)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
            what = f"shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise UsageError(f"the loss is {what}; expected a tensor with one real number. Reduce it, e.g. .mean().")
        return value.reshape(())


class Point:
    """Stand-ins for a model's parameters at one point of parameter space.

    ``names`` (the selected parameters, in the model's order) have differentiable leaves; the others are constants. A
    flat vector over ``names`` has ``n`` entries, `device` of the first leaf, and `dtype` float32; float64 if any leaf
    is that and the device has it.
    """

    def __init__(self, stand_ins: Mapping[str, Tensor], names: Sequence[str]):
        self.stand_ins = dict(stand_ins)
        self.names = tuple(names)
        self.leaves = tuple(self.stand_ins[name] for name in self.names)
        self.sizes = [leaf.numel() for leaf in self.leaves]
        self.n = sum(self.sizes)
        self.device = self.leaves[0].device
        any_wide = any(leaf.dtype == torch.float64 for leaf in self.leaves)
        self.dtype = widest(self.device) if any_wide else torch.float32
        self._alike = all(leaf.dtype == self.dtype and leaf.device == self.device for leaf in self.leaves)

    def split(self, vector: Tensor) -> list[Tensor]:
        """Views of a flat vector ``(…, n)``, shaped, typed and placed like the leaves."""
        lead = vector.shape[:-1]
        pairs = zip(vector.split(self.sizes, -1), self.leaves, strict=True)
        parts = [part.reshape((*lead, *leaf.shape)) for part, leaf in pairs]
        if self._alike and vector.dtype == self.dtype and vector.device == self.device:
            return parts  # asking each would take 4 % of the product of a small network
        return [part.to(leaf) for part, leaf in zip(parts, self.leaves, strict=True)]

    def join(self, tensors: Iterable[Tensor]) -> Tensor:
        """The flat vector ``(n,)`` of tensors shaped like the leaves."""
        flat = [t.reshape(-1) for t in tensors]
        return torch.cat(flat if self._alike else [t.to(self.device, self.dtype) for t in flat])

    def moved(self, offset: Tensor) -> Point:
        """The point at ``self + offset``, ``offset`` ``(n,)``; its selected leaves are new memory."""
        with torch.no_grad():
            pairs = zip(self.names, self.leaves, self.split(offset), strict=True)
            leaves = {name: nn.Parameter(leaf + d) for name, leaf, d in pairs}
        return Point(self.stand_ins | leaves, self.names)

    def slices(self) -> dict[str, slice]:
        """Where each selected parameter stands in a flat vector."""
        ends = torch.tensor(self.sizes).cumsum(0).tolist()
        return {name: slice(end - size, end) for name, size, end in zip(self.names, self.sizes, ends, strict=True)}


class LossClosure:
    """The mean loss of fixed data as a function of the parameters: the same number however often it is asked.

    Two forms, told apart by ``batch``::

        LossClosure(model, loss_fn, (inputs, targets))    # loss_fn(model(inputs), targets)
        LossClosure(model, loss_fn, {"input_ids": …})     # loss_fn(model(**batch)); without loss_fn: outputs.loss
        LossClosure(model, closure)                       # closure() calls the model and returns the loss

    ``inputs`` may be a tensor, a tuple (positional arguments) or a mapping (keyword arguments). A plain closure must
    reach its parameters through ``model`` while it runs.

    In ``mode="eval"`` dropout is off and BatchNorm uses its running statistics. In ``mode="train"`` every module keeps
    its own mode: BatchNorm uses the batch's statistics and dropout one mask, held fixed. Random numbers, buffers, modes
    and attributes are put back after each session.

    Args:
        model: the model; wrappers for compilation and data parallelism are looked through.
        loss_fn: see above.
        batch: see above.
        mode: ``"eval"`` or ``"train"``.
        dtype: measure in this precision, e.g. ``torch.float64``; parameters, buffers and the batch are cast, the model
            is not. Default: the parameters' own, and float32 for half-precision parameters given with a batch.
        group: under ``torch.distributed``, average values, gradients and products over the ranks of this group, each
            of which has its own data and must ask for the same things (as `spectrum` does when called alike).

    Raises:
        UsageError: if the model is sharded or complex, its device has no such ``dtype``, or a batch has a form that is
            not listed.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Any] | None = None,
        batch: Any = None,
        *,
        mode: Mode = "eval",
        dtype: torch.dtype | None = None,
        group: dist.ProcessGroup | None = None,
    ):
        if mode not in ("eval", "train"):
            raise UsageError(f'mode={mode!r}; expected "eval" or "train".')
        self.model = _unwrap(model)
        self.mode: Mode = mode
        self.group = group
        self._given = model
        self._forget()
        trainable = {name: p for name, p in self.named().items() if p.requires_grad}
        for name, p in trainable.items():
            if any(kind.__name__ == "DTensor" for kind in type(p).__mro__):
                raise UsageError(f"parameter {name} is sharded (DTensor); curvature needs whole parameters.")
            if not p.is_floating_point():
                raise UsageError(f"parameter {name} has dtype {p.dtype}; curvature here is that of real parameters.")
        if not trainable:
            raise UsageError(f"{type(self.model).__name__} has no trainable parameter; nothing to differentiate.")
        self.names = tuple(trainable)
        self._trained = {id(p): (name, p) for name, p in trainable.items()}
        first = {id(p): clean(name) for name, p in self.model.named_parameters()}
        self._aliases = {clean(k): first[id(p)] for k, p in self.model.named_parameters(remove_duplicate=False)}
        half = any(p.dtype in (torch.float16, torch.bfloat16) for p in trainable.values())
        self.dtype = torch.float32 if dtype is None and half and batch is not None else dtype
        self.devices = tuple(dict.fromkeys(p.device for p in trainable.values()))
        lacking = [f"{d}" for d in self.devices if widest(d) != torch.float64] if dtype == torch.float64 else []
        if lacking:
            raise UsageError(
                f"{lacking[0]} has no {dtype}; leave dtype= out, or measure a copy of the model on the CPU."
            )
        self._random = RandomState.capture(self.devices)
        if batch is not None:
            plain = dict(batch) if isinstance(batch, Mapping) else batch  # a tokenizer's mapping is opaque to pytree
            self.batches = (_batch(self.model, loss_fn, self._cast(plain)),)
        elif loss_fn is not None:
            self.batches = (Batch(loss_fn, lambda value: value),)
        else:
            raise UsageError("neither a loss function with a batch nor a closure was given; pass one of the two.")
        self.plain = batch is None

    @classmethod
    def mean(
        cls,
        model: nn.Module,
        loss_fn: Callable[..., Any] | None,
        batches: Iterable[Any],
        *,
        weights: Sequence[float] | None = None,
        mode: Mode = "eval",
        dtype: torch.dtype | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> LossClosure:
        """The mean over several batches, held in memory one graph at a time.

        Args:
            model: the model.
            loss_fn: as for one batch.
            batches: each in a form that one batch may have.
            weights: one per batch, scaled to sum to 1. Default: each batch's number of examples.
            mode: as for one batch.
            dtype: as for one batch.
            group: as for one batch.

        Returns:
            The closure of ``Σ weight · loss``.

        Raises:
            UsageError: if there is no batch, or weights do not fit them.
        """
        each = [cls(model, loss_fn, batch, mode=mode, dtype=dtype, group=group) for batch in batches]
        if not each:
            raise UsageError("batches is empty; expected at least one batch.")
        parts = [closure.batches[0] for closure in each]
        given = list(weights) if weights is not None else [part.size or 1 for part in parts]
        if len(given) != len(parts) or min(given) < 0 or sum(given) <= 0:
            raise UsageError(f"weights {given} for {len(parts)} batches; expected one number >= 0 per batch.")
        closure = each[0]
        closure.batches = tuple(replace(p, weight=w / sum(given)) for p, w in zip(parts, given, strict=True))
        return closure

    @classmethod
    def total(
        cls,
        model: nn.Module,
        closures: Sequence[Callable[[], Tensor]],
        *,
        mode: Mode = "eval",
        dtype: torch.dtype | None = None,
    ) -> LossClosure:
        """The sum of several plain closures, held in memory one graph at a time: a step's micro-batches.

        Args:
            model: the model.
            closures: at least one; each calls the model and returns its share of the loss.
            mode: as for one closure.
            dtype: as for one closure.

        Returns:
            The closure of ``Σ loss``.
        """
        closure = cls(model, closures[0], mode=mode, dtype=dtype)
        closure.batches = tuple(Batch(each, closure.batches[0].loss) for each in closures)
        return closure

    @property
    def size(self) -> int | None:
        """Number of examples (first dimension of the inputs), None for a plain closure."""
        sizes = [b.size for b in self.batches]
        return None if any(s is None for s in sizes) else sum(s for s in sizes if s is not None)

    def select(self, parameters: Selection = None) -> tuple[str, ...]:
        """Names of the trainable parameters that ``parameters`` selects, in the model's order.

        Args:
            parameters: names of parameters or of modules; None for all.

        Returns:
            The names, without duplicates.

        Raises:
            UsageError: if a name is unknown or selects nothing trainable.
        """
        if parameters is None:
            return self.names
        chosen: set[str] = set()
        for wanted in [parameters] if isinstance(parameters, str) else parameters:
            name = clean(wanted)
            found = {real for alias, real in self._aliases.items() if alias == name or alias.startswith(f"{name}.")}
            if not found & set(self.names):
                modules = [clean(m) for m, _ in self.model.named_modules() if m]
                near = ", ".join(get_close_matches(name, [*self._aliases, *modules], 3)) or "none is close"
                problem = "is frozen" if found else "is neither a parameter nor a module with parameters"
                raise UsageError(f"{wanted!r} {problem} in {type(self.model).__name__}; near names: {near}.")
            chosen |= found
        return tuple(name for name in self.names if name in chosen)

    def point(self, parameters: Selection = None) -> Point:
        """Stand-ins for the parameters where the model is now.

        Args:
            parameters: which get differentiable leaves.

        Returns:
            A new `Point`. Where no cast is needed it shares the parameters' memory, and autograd refuses a graph built
            on it once the optimizer has changed them.
        """
        names = self.select(parameters)
        chosen = set(names)
        with torch.inference_mode(False):
            return Point(
                {k: nn.Parameter(self._cast(p.detach()), requires_grad=k in chosen) for k, p in self.named().items()},
                names,
            )

    @contextmanager
    def session(self, point: Point) -> Iterator[None]:
        """The modules hold ``point`` in here, and may be evaluated and differentiated. Sessions may be nested."""
        with ExitStack() as stack:
            if not self._slots:
                stack.enter_context(undisturbed(self._given, self.mode, self.devices))
                stack.callback(self._forget)
                self._remember()
            held = [table[key] for table, key, _ in self._slots]
            wanted = [point.stand_ins[name] for _, _, name in self._slots]
            if any(a is not b for a, b in zip(held, wanted, strict=True)):  # points share what is frozen
                stack.callback(self._install, held)
                self._install(wanted)
            yield

    def _remember(self) -> None:
        self._session_names = self.named()
        named = {id(p): name for name, p in self._session_names.items()}
        self._slots = [
            (module._parameters, key, named[id(p)])
            for module in self.model.modules()
            for key, p in module._parameters.items()
            if p is not None
        ]
        self._buffers = [
            (m._buffers, k, b) for m in self.model.modules() for k, b in m._buffers.items() if b is not None
        ]

    def _forget(self) -> None:
        self._slots, self._buffers, self._session_names = [], [], {}

    def _install(self, tensors: list[Any]) -> None:
        for (table, key, _), tensor in zip(self._slots, tensors, strict=True):
            table[key] = tensor
        for module in self.model.modules():
            if isinstance(module, nn.RNNBase):  # keeps its weights in a list besides
                module._flat_weights = [getattr(module, name, None) for name in module._flat_weights_names]

    def outputs(self, batch: Batch) -> Any:
        """The model's outputs for one of `batches`, inside a session; the same however often it is called."""
        self._random.restore()
        clones: dict[int, Tensor] = {}
        for table, key, buffer in self._buffers:
            if id(buffer) not in clones:
                clones[id(buffer)] = self._cast(buffer.detach().clone())
            table[key] = clones[id(buffer)]
        return batch.outputs()

    def loss(self, batch: Batch, *, twice: bool = False) -> Tensor:
        """The differentiable loss ``()`` of one of `batches`, inside a session.

        Args:
            batch: one of `batches`.
            twice: refuse a loss whose second derivative autograd would get wrong without saying so.

        Raises:
            UsageError: if the loss cannot be differentiated with respect to the stand-ins, and why.
            RuntimeError: if ``twice`` and a function in the graph is marked as differentiable once.
        """
        loss = batch.loss_of(self.outputs(batch))
        self._refuse_what_would_be_wrong(loss, twice)
        return loss

    def value(self, point: Point | None = None) -> float:
        """The mean loss at ``point``; default: where the model is. In the loss's own unit."""
        with self.session(point or self.point()), torch.no_grad():
            losses = [b.weight * double(b.loss_of(self.outputs(b))) for b in self.batches]
        return float(self.over_ranks(torch.stack(losses).sum()))

    def gradient(self, point: Point | None = None) -> Tensor:
        """The gradient ``(n,)`` of the mean loss over the point's selected parameters; default: all, where they are."""
        point = point or self.point()
        total = torch.zeros(point.n, dtype=point.dtype, device=point.device)
        with self.session(point):
            for batch in self.batches:
                parts = torch.autograd.grad(self.loss(batch), point.leaves, allow_unused=True, materialize_grads=True)
                total.add_(point.join(parts), alpha=batch.weight)
        return self.over_ranks(total)

    def over_ranks(self, tensor: Tensor) -> Tensor:
        """The mean of every rank's ``tensor`` over ``group``; the tensor itself without a group."""
        if self.group is None:
            return tensor
        total = tensor.contiguous()
        dist.all_reduce(total, group=self.group)
        return total.div_(dist.get_world_size(self.group))

    def named(self) -> dict[str, Tensor]:
        """The model's own parameters by name, tied ones once; not the stand-ins of a session."""
        return self._session_names or {clean(name): p for name, p in self.model.named_parameters()}

    def _cast(self, data: Any) -> Any:
        if self.dtype is None:
            return data
        return tree_map(lambda t: t.to(self.dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, data)

    def _refuse_what_would_be_wrong(self, loss: Tensor, twice: bool) -> None:
        if not loss.requires_grad:
            raise UsageError(
                "the loss does not depend on the selected parameters; it must be computed by calling the model, with "
                "gradients enabled and nothing detached."
            )
        for node in _nodes(loss):
            outside = self._trained.get(id(getattr(node, "variable", None)))
            if outside is not None:
                raise UsageError(
                    f"the closure reads parameter {outside[0]} from outside the model; look it up while the closure "
                    "runs, e.g. in model.parameters(), so that its share of the curvature is counted."
                )
            if twice and _once_differentiable(node):  # autograd would take its second derivative for zero
                raise RuntimeError(f"{node.name()} is marked once_differentiable")
            if node.name() == "CheckpointFunctionBackward":
                raise UsageError(
                    "the model uses reentrant checkpointing, which cannot be differentiated twice; "
                    "call torch.utils.checkpoint.checkpoint(…, use_reentrant=False)."
                )


def clean(name: str) -> str:
    """A dotted name without the prefix that compiling a module adds."""
    return name.replace("_orig_mod.", "")


def _unwrap(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def _batch(model: nn.Module, loss_fn: Callable[..., Any] | None, batch: Any) -> Batch:
    if isinstance(batch, Mapping):
        inputs, targets, has_targets = batch, None, False
    elif isinstance(batch, (tuple, list)) and len(batch) == 2 and loss_fn is not None:
        (inputs, targets), has_targets = batch, True
    else:
        raise UsageError(
            f"batch is a {type(batch).__name__}"
            + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else "")
            + "; "
            "expected (inputs, targets) with a loss_fn, or a mapping of keyword arguments. Otherwise pass a closure."
        )

    def outputs() -> Any:
        if isinstance(inputs, Mapping):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)

    tensors = [t for t in tree_leaves(dict(inputs) if isinstance(inputs, Mapping) else inputs) if isinstance(t, Tensor)]
    size = tensors[0].shape[0] if tensors and tensors[0].dim() else None
    return Batch(outputs, loss_fn or _own_loss, targets, has_targets, size=size)


def _own_loss(outputs: Any) -> Any:
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", outputs)
    if loss is None:
        raise UsageError("the model's outputs hold no loss; put labels into the batch, or pass loss_fn.")
    return loss


def _nodes(loss: Tensor) -> Iterator[Any]:
    seen: set[Any] = set()
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting.extend(following for following, _ in node.next_functions)


def _once_differentiable(node: Any) -> bool:
    backward: Any = getattr(getattr(node, "_forward_cls", None), "backward", None)
    # The decorator leaves no mark but itself: a wrapper defined in torch.autograd.function.
    defined_in = once_differentiable.__code__.co_filename
    return hasattr(backward, "__wrapped__") and backward.__code__.co_filename == defined_in
