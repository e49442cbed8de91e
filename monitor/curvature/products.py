"""Matrices that are known only by their products with a vector: the Hessian and its positive relatives.

``Hessian`` H = ∇²L · ``GaussNewton`` G = J'·(∇²_z ℓ)·J · ``Fisher`` with labels drawn from the model ·
``EmpiricalFisher`` with the true labels, which is no substitute for a Hessian. All are of the mean loss over fixed
data, symmetric, and act on flat vectors over the selected parameters.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_unflatten

from monitor.curvature.closure import Batch, LossClosure, Point, Selection
from monitor.curvature.kernels import twice_differentiable_kernels
from monitor.curvature.precision import double
from monitor.errors import MonitorError, UsageError

Way = Literal["auto", "cached", "recompute", "forward", "difference"]


class Operator:
    """A symmetric ``n × n`` matrix given by ``product``: ``(n,)`` → ``(n,)`` in `dtype` on `device`.

    Args:
        product: the matrix times a vector.
        n: number of rows.
        dtype: of the vectors.
        device: of the vectors.
    """

    name = "operator"

    def __init__(
        self,
        product: Callable[[Tensor], Tensor],
        n: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.product = product
        self.n = n
        self.dtype = dtype
        self.device = torch.device(device)

    def session(self) -> AbstractContextManager[Any]:
        """Enter this around many products: what one product would set up and undo is then done once."""
        return nullcontext()

    def __call__(self, vector: Tensor) -> Tensor:
        """The product with ``vector`` ``(n,)``."""
        return self.product(vector)

    def dense(self) -> Tensor:
        """The matrix itself ``(n, n)``, by ``n`` products; for small problems."""
        eye = torch.eye(self.n, dtype=self.dtype, device=self.device)
        with self.session():
            return torch.stack([self(row) for row in eye])


class ClosureOperator(Operator, ABC):
    """An operator of a `LossClosure` at the point where its model is now; ``point`` holds the stand-ins.

    Subclasses keep no reference to themselves, so that graphs are freed with the last use of the operator, and not by
    a later garbage collection in the middle of a training step.
    """

    def __init__(self, closure: LossClosure, parameters: Selection = None):
        self.closure = closure
        self.point: Point = closure.point(parameters)
        self.n = self.point.n
        self.dtype = self.point.dtype
        self.device = self.point.device

    def session(self) -> AbstractContextManager[Any]:
        """The closure's session at `point`."""
        return self.closure.session(self.point)

    def __call__(self, vector: Tensor) -> Tensor:
        """The product with ``vector`` ``(n,)``."""
        if vector.shape != (self.n,):
            raise UsageError(f"vector has shape {tuple(vector.shape)}; expected ({self.n},), one value per parameter.")
        with self.closure.session(self.point):
            return self.closure.over_ranks(self._product(vector))

    @abstractmethod
    def _product(self, vector: Tensor) -> Tensor: ...


class Hessian(ClosureOperator):
    """H·v for the Hessian H of the mean loss, exact up to rounding (except ``way="difference"``).

    Ways, and what one product costs in gradients (median over three models): ``cached`` reverse-over-reverse on a graph
    built once and kept (2.0; refused by autograd once the parameters have changed), ``recompute`` the same without
    keeping it (2.6), ``forward`` forward-over-reverse (3.6), ``difference`` central finite difference of the gradient
    (2.0; for smooth networks only: on a ReLU network it can be wrong by more than 100 %). ``auto`` takes the first of
    cached, recompute, forward that the model and the memory allow, and gives the cached graph up where memory ends
    later; several batches are never cached.

    Args:
        closure: the loss.
        parameters: which parameters; default all trainable.
        way: see above.

    Attributes:
        way: the way in use; with ``auto``, known after the first product.
        unused: parameters that the loss does not depend on; their rows are zero. Known after the first product.

    Raises:
        MonitorError: on the first product, if no way works; the message says why each did not.
        UsageError: if ``way`` is unknown.
    """

    name = "hessian"

    def __init__(self, closure: LossClosure, parameters: Selection = None, way: Way = "auto"):
        super().__init__(closure, parameters)
        if way not in get_args(Way):
            raise UsageError(f"way={way!r}; expected one of {', '.join(get_args(Way))}.")
        self.way: Way = way
        self.unused: tuple[str, ...] = ()
        self._chosen = False
        self._graph: _Graph | None = None

    def _product(self, vector: Tensor) -> Tensor:
        if self.way != "auto":
            try:
                return self._by(self.way, vector)
            except RuntimeError as e:
                if not (self._chosen and self.way == "cached" and _out_of_memory(e)):
                    raise
            self._graph, self.way = None, "recompute"  # what else the caller holds has grown since the graph was built
            return self._recompute(vector)
        failures: list[str] = []
        last: Exception | None = None
        ladder: tuple[Way, ...] = ("cached", "recompute", "forward")
        for way in ladder if len(self.closure.batches) == 1 else ladder[1:]:
            try:
                product = self._by(way, vector)
            except RuntimeError as e:
                # a traceback holds every frame and with it the graph, for which there may have been no room
                self._graph, last = None, e.with_traceback(None)
                failures.append(f"{way}: {str(e).splitlines()[0][:160]}")
                continue
            self.way, self._chosen = way, True
            return product
        raise MonitorError(
            f"no exact Hessian product works for {type(self.closure.model).__name__} ({'; '.join(failures)}). "
            'If it is smooth, way="difference" approximates the product by two gradients.'
        ) from last

    def _by(self, way: Way, vector: Tensor) -> Tensor:
        return getattr(self, f"_{way}")(vector)

    def _first_backward(self, batch: Batch) -> _Graph:
        leaves = self.point.leaves
        with twice_differentiable_kernels():
            loss = self.closure.loss(batch, twice=True)
        gradient = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
        curved = [i for i, g in enumerate(gradient) if g is not None and g.requires_grad]
        self.unused = tuple(name for name, g in zip(self.point.names, gradient, strict=True) if g is None)
        return _Graph([gradient[i] for i in curved], curved, [leaf._version for leaf in leaves])

    def _second_backward(self, graph: _Graph, vector: Tensor, keep: bool) -> Tensor:
        if not graph.curved:
            return torch.zeros_like(vector)
        parts = self.point.split(vector)
        found = torch.autograd.grad(
            graph.gradient,
            self.point.leaves,
            [parts[i] for i in graph.curved],
            retain_graph=keep,
            materialize_grads=True,
            allow_unused=True,
        )
        return self.point.join(found)

    def _cached(self, vector: Tensor) -> Tensor:
        if self._graph is None:
            if len(self.closure.batches) != 1:
                raise UsageError(f'way="cached" with {len(self.closure.batches)} batches; use "recompute".')
            self._graph = self._first_backward(self.closure.batches[0])
        if self._graph.versions != [leaf._version for leaf in self.point.leaves]:
            raise UsageError("the parameters have changed since this Hessian was built; build a new one.")
        return self._second_backward(self._graph, vector, keep=True)

    def _recompute(self, vector: Tensor) -> Tensor:
        return self._mean(lambda batch: self._second_backward(self._first_backward(batch), vector, keep=False))

    def _forward(self, vector: Tensor) -> Tensor:
        names, leaves = self.point.names, self.point.leaves

        def product(batch: Batch) -> Tensor:
            with warnings.catch_warnings(), forward_ad.dual_level():
                warnings.simplefilter("ignore", DeprecationWarning)  # torch scripts its forward-mode rules on first use
                parts = zip(names, leaves, self.point.split(vector), strict=True)
                duals = {name: forward_ad.make_dual(leaf, part) for name, leaf, part in parts}
                along = Point(self.point.stand_ins | duals, names)
                with self.closure.session(along):
                    found = torch.autograd.grad(
                        self.closure.loss(batch), along.leaves, allow_unused=True, materialize_grads=True
                    )
                tangents = [forward_ad.unpack_dual(g).tangent for g in found]
            known = zip(tangents, leaves, strict=True)
            return self.point.join(torch.zeros_like(leaf) if t is None else t for t, leaf in known)

        return self._mean(product)

    def _difference(self, vector: Tensor) -> Tensor:
        # The step balances truncation (∝ h²) against rounding (∝ eps / h) in a central difference: h ∝ eps^(1/3).
        size = sum(float(double(leaf.detach()).square().sum()) for leaf in self.point.leaves) ** 0.5
        length = float(vector.norm())
        if length == 0:
            return torch.zeros_like(vector)
        h = torch.finfo(self.dtype).eps ** (1 / 3) * max(size, 1.0) / length
        ahead, behind = (self.closure.gradient(self.point.moved(s * h * vector)) for s in (1, -1))
        return (ahead - behind) / (2 * h)

    def _mean(self, product: Callable[[Batch], Tensor]) -> Tensor:
        total = torch.zeros(self.n, dtype=self.dtype, device=self.device)
        for batch in self.closure.batches:
            total.add_(product(batch), alpha=batch.weight)
        return total


def _out_of_memory(e: RuntimeError) -> bool:
    return isinstance(e, torch.OutOfMemoryError) or "can't allocate memory" in str(e)  # the CPU has no class of its own


class _Graph(NamedTuple):
    """A gradient that can be differentiated once more: its parts that depend on the leaves, and which these are."""

    gradient: list[Tensor]
    curved: list[int]
    versions: list[int]


class _Linear(NamedTuple):
    """A model's outputs, a loss of them, and their Jacobian J: ``push`` is v ↦ J v, ``pull`` is u ↦ J'u."""

    outputs: list[Tensor]
    loss_of: Callable[[Sequence[Tensor]], Tensor]
    push: Callable[[Tensor], Sequence[Tensor]]
    pull: Callable[[Sequence[Tensor]], Tensor]


class _OutputOperator(ClosureOperator):
    """J'·B·J with the Jacobian J of the model's outputs and a block B that acts on one batch's outputs."""

    def __init__(self, closure: LossClosure, parameters: Selection = None):
        if closure.plain:
            raise UsageError(
                f"{self.name} needs the model's outputs, which a plain closure hides; "
                "build the LossClosure from (model, loss_fn, batch)."
            )
        super().__init__(closure, parameters)
        self._kept: Callable[[Tensor], Tensor] | None = None

    def _product(self, vector: Tensor) -> Tensor:
        total = torch.zeros(self.n, dtype=self.dtype, device=self.device)
        keep = len(self.closure.batches) == 1
        for batch in self.closure.batches:
            product = self._kept or self._build(batch)
            if keep:
                self._kept = product
            total.add_(product(vector), alpha=batch.weight)
        return total

    def _build(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        line = self._linearise(batch)
        block = self._block(batch, [t.detach() for t in line.outputs], line.loss_of)
        return lambda vector: line.pull(block(line.push(vector)))

    def _linearise(self, batch: Batch) -> _Linear:
        with twice_differentiable_kernels():
            flat, spec = tree_flatten(self.closure.outputs(batch))
        differentiable = [i for i, t in enumerate(flat) if isinstance(t, Tensor) and t.requires_grad]
        outputs = [flat[i] for i in differentiable]
        if not outputs:
            raise UsageError("the model's outputs do not depend on the selected parameters; select others.")

        def loss_of(values: Sequence[Tensor]) -> Tensor:
            changed = list(flat)
            for i, value in zip(differentiable, values, strict=True):
                changed[i] = value
            return batch.loss_of(tree_unflatten(changed, spec))

        point, leaves = self.point, self.point.leaves
        # J v by differentiating u ↦ J'u, which is linear: needs reverse mode only, so every model that trains has it.
        u = [torch.zeros_like(t, requires_grad=True) for t in outputs]
        pulled = torch.autograd.grad(outputs, leaves, u, create_graph=True, allow_unused=True)
        used = [i for i, t in enumerate(pulled) if t is not None and t.requires_grad]
        keep = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}

        def push(vector: Tensor) -> Sequence[Tensor]:
            parts = point.split(vector)
            return torch.autograd.grad([pulled[i] for i in used], u, [parts[i] for i in used], **keep)

        def pull(cotangents: Sequence[Tensor]) -> Tensor:
            return point.join(torch.autograd.grad(outputs, leaves, cotangents, **keep))

        return _Linear(outputs, loss_of, push, pull)

    @abstractmethod
    def _block(
        self, batch: Batch, outputs: list[Tensor], loss_of: Callable[[Sequence[Tensor]], Tensor]
    ) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]: ...


class GaussNewton(_OutputOperator):
    """G·v for the generalized Gauss–Newton matrix G = J'·(∇²_z ℓ)·J: the Hessian without the curvature of the network.

    Positive semi-definite wherever the loss is convex in the outputs. For cross-entropy and mean squared error it
    equals the Fisher information of the model's own distribution.

    Args:
        closure: built from (model, loss_fn, batch).
        parameters: which parameters; default all trainable.

    Raises:
        UsageError: if the closure is plain.
    """

    name = "gauss_newton"

    def _block(
        self, batch: Batch, outputs: list[Tensor], loss_of: Callable[[Sequence[Tensor]], Tensor]
    ) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
        at = [t.requires_grad_() for t in outputs]
        gradient = torch.autograd.grad(loss_of(at), at, create_graph=True, allow_unused=True, materialize_grads=True)
        curved = [i for i, g in enumerate(gradient) if g.requires_grad]

        def block(pushed: Sequence[Tensor]) -> Sequence[Tensor]:
            if not curved:
                return [torch.zeros_like(t) for t in pushed]
            return torch.autograd.grad(
                [gradient[i] for i in curved],
                at,
                [pushed[i] for i in curved],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )

        return block


class EmpiricalFisher(_OutputOperator):
    """F·v for the empirical Fisher (1/N) Σ ∇ℓ_i ∇ℓ_i' with the true labels. Not an approximation of the Hessian.

    An example is one index of the outputs' first dimension, and the loss must be the plain mean over them, N: an
    ignored or differently weighted row scales its share.

    Args:
        closure: built from (model, loss_fn, batch) with a loss that is a mean over examples.
        parameters: which parameters; default all trainable.

    Raises:
        UsageError: if the closure is plain.
    """

    name = "empirical_fisher"

    def _block(
        self, batch: Batch, outputs: list[Tensor], loss_of: Callable[[Sequence[Tensor]], Tensor]
    ) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
        return _outer(_gradients(outputs, loss_of))

    def projections(self, direction: Tensor) -> Tensor:
        """The slope of every example's own loss along a direction, u'∇ℓ_i, without forming any ∇ℓ_i.

        Args:
            direction: u, ``(n,)``.

        Returns:
            ``(N,)``, the batches one after the other.

        Cost: about two gradients.
        """
        found = []
        with self.session():
            for batch in self.closure.batches:
                line = self._linearise(batch)
                gradients = _gradients([t.detach() for t in line.outputs], line.loss_of)
                found.append(_along(gradients, line.push(direction)) * len(gradients[0]))
        return torch.cat(found)


class Fisher(_OutputOperator):
    """F·v for the Fisher information with labels drawn from the model's softmax, averaged over ``draws``.

    Its mean over draws is `GaussNewton` of cross-entropy, which costs the same and has no sampling noise.

    Args:
        closure: built from (model, loss_fn, (inputs, targets)) with class indices as targets, one tensor of logits with
            classes last as outputs, and a loss that is a mean over examples.
        parameters: which parameters; default all trainable.
        draws: number of independent sets of labels.
        seed: of the draws.

    Raises:
        UsageError: if the closure has no targets, or they are not class indices.
    """

    name = "fisher"

    def __init__(self, closure: LossClosure, parameters: Selection = None, draws: int = 1, seed: int = 0):
        super().__init__(closure, parameters)
        self.draws = draws
        self.seed = seed

    def _block(
        self, batch: Batch, outputs: list[Tensor], loss_of: Callable[[Sequence[Tensor]], Tensor]
    ) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
        logits, targets = outputs[0], batch.targets
        shape = targets.shape if isinstance(targets, Tensor) and not targets.is_floating_point() else None
        if len(outputs) != 1 or shape != logits.shape[:-1]:
            raise UsageError(
                "fisher draws class labels: it needs one tensor of logits (…, class) and targets (…) of class indices."
            )
        generator = torch.Generator(device=logits.device).manual_seed(self.seed)
        probabilities = logits.softmax(-1).reshape(-1, logits.shape[-1])
        blocks = []
        for _ in range(self.draws):
            labels = torch.multinomial(probabilities, 1, generator=generator).reshape(logits.shape[:-1])
            at = logits.detach().requires_grad_()
            blocks.append(_outer(torch.autograd.grad(batch.loss(at, labels), [at])))
        return lambda pushed: [torch.stack([block(pushed)[0] for block in blocks]).mean(0)]


def _gradients(outputs: list[Tensor], loss_of: Callable[[Sequence[Tensor]], Tensor]) -> Sequence[Tensor]:
    at = [t.requires_grad_() for t in outputs]
    return torch.autograd.grad(loss_of(at), at, allow_unused=True, materialize_grads=True)


def _along(gradients: Sequence[Tensor], pushed: Sequence[Tensor]) -> Tensor:
    n = len(gradients[0])
    return torch.stack([(g * w).reshape(n, -1).sum(1) for g, w in zip(gradients, pushed, strict=True)]).sum(0)


def _outer(gradients: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
    # With g_i = ∇_z of the mean loss for example i, ∇ℓ_i = N g_i, so (1/N) Σ ∇ℓ_i ∇ℓ_i' is N Σ g_i g_i'.
    n = len(gradients[0])

    def block(pushed: Sequence[Tensor]) -> Sequence[Tensor]:
        along = _along(gradients, pushed)
        return [n * g * along.reshape(-1, *[1] * (g.dim() - 1)) for g in gradients]

    return block


def head_hessian(features: Tensor, logits: Tensor, *, bias: bool = True) -> Operator:
    """The Hessian of softmax cross-entropy over a linear head alone, mean_i (diag p_i − p_i p_i') ⊗ z_i z_i'.

    No graph, no second derivative: it needs only what the head's forward pass saw, and no labels.

    Args:
        features: z, ``(N, d)``, the head's inputs.
        logits: ``(N, C)``, its outputs.
        bias: whether the head has a bias.

    Returns:
        The operator over (weight ``(C, d)``, bias ``(C,)``) as `torch.nn.Linear` holds them; positive semi-definite.

    Raises:
        UsageError: if the shapes do not fit.

    Cost: 4·N·C·d flops a product.
    Source: Hemati et al. (2023), Understanding Hessian alignment for domain generalization.
    """
    if features.dim() != 2 or logits.dim() != 2 or len(features) != len(logits):
        shapes = f"features {tuple(features.shape)}, logits {tuple(logits.shape)}"
        raise UsageError(f"{shapes}; expected (N, d) and (N, C).")
    z = features.detach()
    if bias:
        z = torch.cat([z, torch.ones_like(z[:, :1])], 1)
    p = logits.detach().to(z).softmax(-1)
    d, classes = features.shape[1], p.shape[1]

    def product(v: Tensor) -> Tensor:
        V = v[: classes * d].view(classes, d)
        if bias:
            V = torch.cat([V, v[classes * d :, None]], 1)
        a = p * (z @ V.T)
        W = (a - p * a.sum(1, keepdim=True)).T @ z / len(z)
        return torch.cat([W[:, :d].reshape(-1), W[:, d:].reshape(-1)])

    operator = Operator(product, classes * z.shape[1], z.dtype, z.device)
    operator.name = "head_hessian"
    return operator


def scaled(operator: Operator, scale: Tensor) -> Operator:
    """D^½ A D^½ for the diagonal D = ``scale``.

    Args:
        operator: A.
        scale: ``(n,)``, not negative; zero takes a parameter out.

    Returns:
        The scaled operator. With ``scale = 1 / P`` its largest eigenvalue is the sharpness preconditioned by P.

    Raises:
        UsageError: if ``scale`` has another length or a value that is not positive and finite.
    """
    if scale.shape != (operator.n,):
        raise UsageError(f"scale has shape {tuple(scale.shape)}; expected ({operator.n},), one value per parameter.")
    if not bool((torch.isfinite(scale) & (scale >= 0)).all()):
        raise UsageError("scale has values that are negative or not finite; a preconditioner must be positive.")
    root = scale.sqrt().to(operator.device, operator.dtype)
    return _Derived("scaled_" + operator.name, lambda v: root * operator(root * v), [operator])


def combined(operators: Sequence[Operator], weights: Sequence[float]) -> Operator:
    """Σ weight · A over operators of one size, e.g. the difference of two domains' Hessians with weights (1, -1).

    Raises:
        UsageError: if the sizes differ.
    """
    if len({o.n for o in operators}) != 1 or len(operators) != len(weights):
        sizes = [o.n for o in operators]
        raise UsageError(f"operators of sizes {sizes} with {len(weights)} weights; expected one size, a weight each.")

    def product(v: Tensor) -> Tensor:
        return torch.stack([w * o(v) for o, w in zip(operators, weights, strict=True)]).sum(0)

    return _Derived("combined", product, operators)


class _Derived(Operator):
    def __init__(self, name: str, product: Callable[[Tensor], Tensor], parts: Sequence[Operator]):
        super().__init__(product, parts[0].n, parts[0].dtype, parts[0].device)
        self.name = name
        self._parts = parts

    def session(self) -> AbstractContextManager[Any]:
        return _sessions(self._parts)


@contextmanager
def _sessions(operators: Sequence[Operator]) -> Iterator[None]:
    with ExitStack() as stack:
        for operator in operators:
            stack.enter_context(operator.session())
        yield
