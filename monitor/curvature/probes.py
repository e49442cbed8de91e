"""Questions about a few batches or examples that one or two products answer each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from os import PathLike, fspath
from pickle import UnpicklingError
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from monitor.curvature.closure import LossClosure, Point, Selection, clean
from monitor.curvature.environment import Mode
from monitor.curvature.lanczos import Array, lanczos
from monitor.curvature.precision import dot, double
from monitor.curvature.products import EmpiricalFisher, Hessian, combined
from monitor.curvature.trace import Estimate, diagonal
from monitor.errors import UsageError


def batch_sharpness(
    model: nn.Module,
    loss_fn: Callable[..., Any] | None,
    batches: Iterable[Any],
    *,
    parameters: Selection = None,
    mode: Mode = "eval",
) -> Estimate:
    """Curvature along the step that each batch asks for, on that batch: the mean of g'Hg / ‖g‖².

    For SGD it settles near 2/η even where the full-batch sharpness stays below; with momentum β near 2(1 − β)/η for
    small batches and 2(1 + β)/η for large ones.

    Args:
        model: the model.
        loss_fn: as for `LossClosure`.
        batches: at least 2, each of the size that training uses, in any form that `LossClosure` takes.
        parameters: names of parameters or modules; default all trainable.
        mode: as for `LossClosure`.

    Returns:
        The mean over batches, with its standard error.

    Raises:
        UsageError: if there are fewer than 2 batches, or a gradient is exactly zero.

    Cost: one gradient and one product per batch: the cheapest stability measure of a real run.
    Source: Andreyev and Beneventano (2024), Edge of stochastic stability.
    """
    found = []
    for batch in batches:
        H = Hessian(LossClosure(model, loss_fn, batch, mode=mode), parameters, way="recompute")
        g = H.closure.gradient(H.point)
        square = dot(g, g)
        if square == 0:
            raise UsageError(f"the gradient of batch {len(found)} is exactly zero; it points nowhere.")
        found.append(dot(g, H(g)) / square)
    if len(found) < 2:
        raise UsageError(f"{len(found)} batch; expected at least 2, so that there is a standard error.")
    return Estimate(float(np.mean(found)), float(np.std(found, ddof=1) / len(found) ** 0.5), len(found))


@dataclass(frozen=True)
class OpposingSignals:
    """Examples that pull hardest, in opposite directions, along the sharpest direction of the loss.

    Attributes:
        projections: ``(N,)``, u'∇ℓ_i: how fast example i's own loss rises along u. Its mean is u'∇L.
        up: examples whose loss rises fastest along u, the strongest first.
        down: examples whose loss falls fastest, the strongest first.
        typical: median of the projections' size: what ``up`` and ``down`` are to be compared with.
    """

    projections: Array
    up: npt.NDArray[np.int64]
    down: npt.NDArray[np.int64]
    typical: float


def opposing_signals(closure: LossClosure, direction: Tensor, *, count: int = 10) -> OpposingSignals:
    """Find groups of examples with opposing signals: a few of both signs that outweigh all others along ``direction``.

    Args:
        closure: built from (model, loss_fn, batch), with a loss that is a mean over examples.
        direction: u, ``(n,)`` over all trainable parameters: the top eigenvector, `Spectrum.eigenvectors` [0].
        count: examples on each side.

    Returns:
        The projections, and the strongest examples of either sign (fewer where a sign has fewer).

    Raises:
        UsageError: if the closure is plain or the direction is of another size.

    Cost: about two gradients, however many examples.
    Source: Rosenfeld and Risteski (2024), Outliers with opposing signals. They rank by the change of each example's
        loss over a step, which away from the edge of stability found 4 of 16 planted examples where this found all.
    """
    matrix = EmpiricalFisher(closure)
    if direction.shape != (matrix.n,):
        raise UsageError(f"direction has shape {tuple(direction.shape)}; expected ({matrix.n},).")
    u = direction.to(matrix.device, matrix.dtype)
    p = matrix.projections(u / u.norm()).cpu().double().numpy()
    order = np.argsort(p)
    down, up = order[:count], order[::-1][:count]
    return OpposingSignals(p, up[p[up] > 0], down[p[down] < 0], float(np.median(np.abs(p))))


@dataclass(frozen=True)
class LossChanges:
    """How unevenly a step changes the losses of single examples. Shares and rates are means over the steps given.

    Attributes:
        share: of all change of loss, Σ|Δ_i|, that falls on the examples that change most; .24 to .38 in smooth training
            for two in a hundred examples.
        split: of these, the share that the rarer sign of Δ_i has: 0 if all move alike, ½ if half rise and half fall.
        flip: of these, the share whose Δ_i had the other sign one step before; NaN for a single step.
        up: examples among them whose loss rose in the last step, the strongest first.
        down: examples whose loss fell, the strongest first.
    """

    share: float
    split: float
    flip: float
    up: npt.NDArray[np.int64]
    down: npt.NDArray[np.int64]


def loss_changes(losses: npt.ArrayLike, *, quantile: float = 0.02) -> LossChanges:
    """Examples with opposing signals, by what single steps do to their losses.

    A share above ½, a split above .3 and flips above ½ while the total loss is not monotone: two groups of outliers
    pull against each other and limit the learning rate. Only at the edge of stability; `opposing_signals` sees them
    before.

    Args:
        losses: ``(t, N)``, each example's loss before and after one or more consecutive steps, t >= 2.
        quantile: share of examples that count as changing most, at least one.

    Returns:
        The unevenness of the change.

    Raises:
        UsageError: if there are fewer than 2 rows, a loss is not finite, or no loss changes.

    Cost: a forward pass per row, made by the caller.
    Source: Rosenfeld and Risteski (2024), Outliers with opposing signals; the score is a definition of this library.
    """
    values = np.asarray(losses, dtype=np.float64)
    if values.ndim != 2 or len(values) < 2 or not np.isfinite(values).all():
        raise UsageError(f"losses have shape {values.shape}; expected (t >= 2, examples), all finite.")
    changes = np.diff(values, axis=0)
    size = np.abs(changes)
    if not size.sum(1).all():
        raise UsageError("a step changed the loss of no example; is each row taken after another update?")
    count = max(1, round(quantile * values.shape[1]))
    top = np.argsort(-size, axis=1, kind="stable")[:, :count]
    signs = np.sign(np.take_along_axis(changes, top, 1))
    split = np.minimum((signs > 0).sum(1), (signs < 0).sum(1)) / count
    before = np.sign(np.take_along_axis(changes[:-1], top[1:], 1))
    return LossChanges(
        share=float((np.take_along_axis(size, top, 1).sum(1) / size.sum(1)).mean()),
        split=float(split.mean()),
        flip=float((before != signs[1:]).mean()) if len(changes) > 1 else float("nan"),
        up=top[-1][signs[-1] > 0],
        down=top[-1][signs[-1] < 0],
    )


def trajectory_kl(past: Tensor, now: Tensor, *, temperature: float = 5.0) -> float:
    """How far the model's predictions have moved: the mean of KL(softmax(past/τ) ‖ softmax(now/τ)), in nats.

    `monitor.probes.TrajectoryKL` records it during training.

    Args:
        past: ``(…, classes)``, the logits of some examples a few epochs ago.
        now: the logits of the same examples now.
        temperature: τ.

    Returns:
        The mean over examples; 0 where nothing moved.

    Raises:
        UsageError: if the shapes differ.

    Source: Du et al. (2022), Sharpness-aware training for free, whose regulariser this is; 5 and a distance of 3 epochs
        are said to be theirs and were not checked.
    """
    if past.shape != now.shape or not past.dim():
        raise UsageError(
            f"past logits have shape {tuple(past.shape)}, present ones {tuple(now.shape)}; expected equal."
        )
    p, q = ((double(z.detach()) / temperature).log_softmax(-1) for z in (past, now))
    return float((p.exp() * (p - q)).sum(-1).mean())


@dataclass(frozen=True)
class Alignment:
    """How far several sources of data agree about the loss they share.

    Attributes:
        names: of the sources.
        gradient_cosine: ``(s, s)``, cosine between the sources' gradients; below 0 they pull apart.
        gradient_distance: ``(s,)``, ‖g_d − mean g‖².
        product_distance: ``(s,)``, ‖H_d g_d − mean‖²: also sees curvature.
        hessian_distance: ``(s, s)``, ‖H_a − H_b‖₂, or None if not asked for.
        diagonal_distance: ``(s,)``, ‖diag H_d − mean‖² of Hutchinson estimates of the diagonals, or None likewise.
    """

    names: tuple[str, ...]
    gradient_cosine: Array
    gradient_distance: Array
    product_distance: Array
    hessian_distance: Array | None
    diagonal_distance: Array | None


def alignment(
    sources: Mapping[str, LossClosure],
    *,
    parameters: Selection = None,
    hessians: bool = False,
    diagonals: int = 0,
    tol: float = 1e-2,
    seed: int = 0,
) -> Alignment:
    """Compare gradients and Hessians of the same model on several domains or data sources.

    Args:
        sources: a closure for each, all of one model.
        parameters: e.g. the head alone, as in the source; default all trainable.
        hessians: also the spectral norm of the difference of every pair of Hessians, by Lanczos.
        diagonals: random vectors for an estimate of each Hessian's diagonal, the same for all sources; 0 leaves the
            comparison of diagonals out. The estimates' noise adds to the distances, and falls with their number.
        tol: of the spectral norm.
        seed: of its start vector and of the random vectors.

    Returns:
        The comparison, in the order of ``sources``.

    Raises:
        UsageError: if there are fewer than 2 sources.

    Cost: one gradient and one product per source; with ``hessians`` some 20 products per pair and source; with
        ``diagonals`` so many more products per source.
    Source: Hemati et al. (2023), Understanding Hessian alignment for domain generalization (HGP and Hutchinson).
    """
    if len(sources) < 2:
        raise UsageError(f"{len(sources)} source; expected at least 2 to compare.")
    operators = [Hessian(closure, parameters, way="recompute") for closure in sources.values()]
    gradients = torch.stack([double(H.closure.gradient(H.point)) for H in operators])
    pairs = zip(operators, gradients, strict=True)
    products = torch.stack([double(H(g.to(H.device, H.dtype))) for H, g in pairs])
    norms = gradients.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
    distance = None
    if hessians:
        distance = np.zeros((len(operators), len(operators)))
        for (i, a), (j, b) in combinations(enumerate(operators), 2):
            k = lanczos(combined([a, b], [1.0, -1.0]), 1, 1, tol=tol, seed=seed)
            distance[i, j] = distance[j, i] = max(abs(k.largest.values[0]), abs(k.smallest.values[0]))
    estimates = [diagonal(H, samples=diagonals, seed=seed) for H in operators] if diagonals else None
    return Alignment(
        names=tuple(sources),
        gradient_cosine=(gradients @ gradients.T / norms[:, None] / norms).cpu().numpy(),
        gradient_distance=_spread(gradients),
        product_distance=_spread(products),
        hessian_distance=distance,
        diagonal_distance=_spread(torch.stack(estimates)) if estimates else None,
    )


def _spread(rows: Tensor) -> Array:
    return (rows - rows.mean(0)).square().sum(1).cpu().numpy()


@dataclass(frozen=True)
class Slice:
    """The loss on a straight line or a plane through parameter space.

    Attributes:
        coordinates: one array per direction: the step lengths along it, 0 being where the model is.
        losses: ``(points,)`` or ``(points, points)``, indexed like ``coordinates``.
    """

    coordinates: tuple[Array, ...]
    losses: Array


def landscape(
    closure: LossClosure,
    directions: Sequence[Tensor] | Tensor,
    *,
    parameters: Selection = None,
    radius: float = 1.0,
    points: int = 21,
) -> Slice:
    """The loss along one direction, or over the plane of two, around where the model is.

    Args:
        closure: the loss.
        directions: one or two vectors ``(n,)``, or ``(1 or 2, n)``, e.g. the top eigenvectors; made unit length.
            Eigenvectors show the axes of the valley; random ones mislead where BatchNorm makes scales arbitrary.
        parameters: what the directions are over: names of parameters or modules; default all trainable.
        radius: how far to go to either side, in the parameters' unit.
        points: evaluations per direction; odd, so that the model itself is one of them.

    Returns:
        The losses on the grid. The model is not moved.

    Raises:
        UsageError: if there are not one or two directions of the right size, or ``points`` is even.

    Cost: ``points`` or ``points²`` forward passes and as many copies of the parameters, one at a time.
    """
    point = closure.point(parameters)
    axes = [d.to(point.device, point.dtype) / d.norm() for d in directions]
    if len(axes) not in (1, 2) or any(d.shape != (point.n,) for d in axes):
        shapes = [tuple(d.shape) for d in directions]
        raise UsageError(f"directions have shapes {shapes}; expected one or two of ({point.n},).")
    if points % 2 == 0 or points < 3:
        raise UsageError(f"points={points}; expected an odd number of at least 3.")
    grid = np.linspace(-radius, radius, points)
    losses = np.empty((points,) * len(axes))
    with closure.session(point):
        for index in np.ndindex(*losses.shape):
            offset = torch.stack([float(grid[i]) * d for i, d in zip(index, axes, strict=True)]).sum(0)
            losses[index] = closure.value(point.moved(offset))
    return Slice((grid,) * len(axes), losses)


@dataclass(frozen=True)
class Barrier:
    """The loss on the straight line between two models.

    Attributes:
        height: largest excess over the straight line between the end points' losses; 0 for linearly connected models.
        alphas: ``(points,)``, 0 at the first model and 1 at the second.
        losses: ``(points,)``.
    """

    height: float
    alphas: Array
    losses: Array


def barrier(
    closure: LossClosure,
    other: Mapping[str, Any] | str | PathLike[str],
    *,
    first: Mapping[str, Any] | str | PathLike[str] | None = None,
    points: int = 21,
) -> Barrier:
    """The loss barrier between two states of a model: max over α of L((1−α)A + αB) − ((1−α)L(A) + αL(B)).

    ::

        closure = LossClosure(model, F.cross_entropy, (x, y), mode="train")
        barrier(closure, other.state_dict())                        # from where the model is now
        barrier(closure, "epoch_90.pt", first="epoch_10.pt")        # between two checkpoints

    Args:
        closure: the loss. With BatchNorm use ``mode="train"``, because the running statistics of the end points are
            wrong in between.
        other: B's parameters by name, such as its ``state_dict()``, or the path of a file that `torch.save` wrote one
            to; it is read with ``weights_only=True``, so that nothing in it is executed. Entries that are no parameter
            are ignored.
        first: A, likewise; default the model as it is.
        points: evaluations, the ends included, at least 3.

    Returns:
        The barrier. The model is not moved.

    Raises:
        UsageError: if a state lacks a parameter or has another shape of one, a file holds no state, running statistics
            differ that ``mode="eval"`` would mix up, or there are too few points.

    Source: Frankle et al. (2020), Linear mode connectivity; Entezari et al. (2022) for the excess over the line.
    """
    if points < 3:
        raise UsageError(f"points={points}; expected at least 3, the ends included.")
    point = closure.point()
    states = {which: _state(given, which) for which, given in (("first", first), ("other", other)) if given is not None}
    if closure.mode == "eval":
        _same_statistics(closure, states)
    start = _offset(point, states["first"], "first") if "first" in states else None
    step = _offset(point, states["other"], "other")
    if start is not None:
        step -= start
    alphas = np.linspace(0, 1, points)
    with closure.session(point):
        ahead = (float(a) * step if start is None else start + float(a) * step for a in alphas)
        losses = np.array([closure.value(point.moved(offset)) for offset in ahead])
    excess = losses - ((1 - alphas) * losses[0] + alphas * losses[-1])
    return Barrier(float(excess.max()), alphas, losses)


def _state(given: Mapping[str, Any] | str | PathLike[str], which: str) -> dict[str, Any]:
    """Tensors by the names that the bare model has; what compiling and wrapping put before them is taken away."""
    held: Any = given
    if not isinstance(given, Mapping):
        which = fspath(given)
        try:
            held = torch.load(given, map_location="cpu", weights_only=True)
        except UnpicklingError:
            raise UsageError(f"{which} holds more than tensors, and code is not run; save a state_dict.") from None
    if not isinstance(held, Mapping) or not any(isinstance(t, Tensor) for t in held.values()):
        keys = ", ".join(map(str, held)) if isinstance(held, Mapping) else ""
        got = f"the keys {keys}" if keys else f"a {type(held).__name__} without tensors"
        raise UsageError(f"{which} holds {got}; expected a state_dict, names and tensors. Pass the part that is one.")
    named = {clean(str(name)): t for name, t in held.items()}
    wrapped = all(name.startswith("module.") for name in named)
    return {name.removeprefix("module.") if wrapped else name: t for name, t in named.items()}


def _offset(point: Point, state: Mapping[str, Any], which: str) -> Tensor:
    """From the point to ``state``, ``(n,)``."""
    differences, faults = [], []
    for name, leaf in zip(point.names, point.leaves, strict=True):
        t = state.get(name)
        if isinstance(t, Tensor) and t.shape == leaf.shape:
            differences.append(t.detach().to(leaf) - leaf.detach())
        else:
            got = f"shape {tuple(t.shape)}" if isinstance(t, Tensor) else "nothing"
            faults.append(f"{which} has {got} for parameter {name}; expected shape {tuple(leaf.shape)}")
    if faults:
        raise UsageError(faults[0] + (f" (and {len(faults) - 1} more like it)." if len(faults) > 1 else "."))
    return point.join(differences)


def _same_statistics(closure: LossClosure, states: Mapping[str, Mapping[str, Any]]) -> None:
    for name, own in closure.model.named_buffers():
        for which, state in states.items():
            t = state.get(clean(name))
            if isinstance(t, Tensor) and own.is_floating_point() and not torch.equal(t.to(own), own):
                raise UsageError(
                    f"{which} has another {clean(name)} than the model, which alone would be used for all of the line; "
                    'build the LossClosure with mode="train", so that statistics are those of the batch.'
                )
