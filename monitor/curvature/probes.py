"""Questions about a few batches or examples that one or two products answer each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from monitor.curvature.closure import LossClosure, Selection
from monitor.curvature.environment import Mode
from monitor.curvature.lanczos import Array, lanczos
from monitor.curvature.products import EmpiricalFisher, Hessian, combined
from monitor.curvature.trace import Estimate
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
        square = float(g.double() @ g.double())
        if square == 0:
            raise UsageError(f"the gradient of batch {len(found)} is exactly zero; it points nowhere.")
        found.append(float(g.double() @ H(g).double()) / square)
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
    p = matrix.projections(u / u.norm()).double().cpu().numpy()
    order = np.argsort(p)
    down, up = order[:count], order[::-1][:count]
    return OpposingSignals(p, up[p[up] > 0], down[p[down] < 0], float(np.median(np.abs(p))))


@dataclass(frozen=True)
class Alignment:
    """How far several sources of data agree about the loss they share.

    Attributes:
        names: of the sources.
        gradient_cosine: ``(s, s)``, cosine between the sources' gradients; below 0 they pull apart.
        gradient_distance: ``(s,)``, ‖g_d − mean g‖².
        product_distance: ``(s,)``, ‖H_d g_d − mean‖²: also sees curvature.
        hessian_distance: ``(s, s)``, ‖H_a − H_b‖₂, or None if not asked for.
    """

    names: tuple[str, ...]
    gradient_cosine: Array
    gradient_distance: Array
    product_distance: Array
    hessian_distance: Array | None


def alignment(
    sources: Mapping[str, LossClosure],
    *,
    parameters: Selection = None,
    hessians: bool = False,
    tol: float = 1e-2,
    seed: int = 0,
) -> Alignment:
    """Compare gradients and Hessians of the same model on several domains or data sources.

    Args:
        sources: a closure for each, all of one model.
        parameters: e.g. the head alone, as in the source; default all trainable.
        hessians: also the spectral norm of the difference of every pair of Hessians, by Lanczos.
        tol: of that norm.
        seed: of its start vector.

    Returns:
        The comparison, in the order of ``sources``.

    Raises:
        UsageError: if there are fewer than 2 sources.

    Cost: one gradient and one product per source; with ``hessians`` some 20 products per pair and source.
    Source: Hemati et al. (2023), Understanding Hessian alignment for domain generalization (HGP).
    """
    if len(sources) < 2:
        raise UsageError(f"{len(sources)} source; expected at least 2 to compare.")
    operators = [Hessian(closure, parameters, way="recompute") for closure in sources.values()]
    gradients = torch.stack([H.closure.gradient(H.point).double() for H in operators])
    pairs = zip(operators, gradients, strict=True)
    products = torch.stack([H(g.to(H.dtype)).double() for H, g in pairs])
    norms = gradients.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
    distance = None
    if hessians:
        distance = np.zeros((len(operators), len(operators)))
        for (i, a), (j, b) in combinations(enumerate(operators), 2):
            k = lanczos(combined([a, b], [1.0, -1.0]), 1, 1, tol=tol, seed=seed)
            distance[i, j] = distance[j, i] = max(abs(k.largest.values[0]), abs(k.smallest.values[0]))
    return Alignment(
        names=tuple(sources),
        gradient_cosine=(gradients @ gradients.T / norms[:, None] / norms).cpu().numpy(),
        gradient_distance=_spread(gradients),
        product_distance=_spread(products),
        hessian_distance=distance,
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
    closure: LossClosure, directions: Sequence[Tensor] | Tensor, *, radius: float = 1.0, points: int = 21
) -> Slice:
    """The loss along one direction, or over the plane of two, around where the model is.

    Args:
        closure: the loss.
        directions: one or two vectors ``(n,)``, or ``(1 or 2, n)``, e.g. the top eigenvectors; made unit length.
            Eigenvectors show the axes of the valley; random ones mislead where BatchNorm makes scales arbitrary.
        radius: how far to go to either side, in the parameters' unit.
        points: evaluations per direction; odd, so that the model itself is one of them.

    Returns:
        The losses on the grid. The model is not moved.

    Raises:
        UsageError: if there are not one or two directions of the right size, or ``points`` is even.

    Cost: ``points`` or ``points²`` forward passes and as many copies of the parameters, one at a time.
    """
    point = closure.point()
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


def barrier(closure: LossClosure, other: Mapping[str, Tensor], *, points: int = 21) -> Barrier:
    """The loss barrier between a model and another state of it: max over α of L((1−α)A + αB) − ((1−α)L(A) + αL(B)).

    Args:
        closure: the loss, of the first model; with BatchNorm use ``mode="train"``, because running statistics of the
            end points are wrong in between.
        other: the second model's parameters by name, such as its ``state_dict()``; other entries are ignored.
        points: evaluations, the ends included.

    Returns:
        The barrier. The model is not moved.

    Raises:
        UsageError: if a parameter is missing from ``other`` or has another shape.

    Source: Frankle et al. (2020), Linear mode connectivity; Entezari et al. (2022) for the excess over the line.
    """
    point = closure.point()
    differences = []
    for name, leaf in zip(point.names, point.leaves, strict=True):
        if name not in other or other[name].shape != leaf.shape:
            got = tuple(other[name].shape) if name in other else "nothing"
            raise UsageError(f"other has {got} for parameter {name}; expected shape {tuple(leaf.shape)}.")
        differences.append(other[name].to(leaf) - leaf.detach())
    step = point.join(differences)
    alphas = np.linspace(0, 1, points)
    with closure.session(point):
        losses = np.array([closure.value(point.moved(float(a) * step)) for a in alphas])
    excess = losses - ((1 - alphas) * losses[0] + alphas * losses[-1])
    return Barrier(float(excess.max()), alphas, losses)
