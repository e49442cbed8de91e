"""How near an optimizer is to the edge of stability: its step size against the curvature it meets.

On a quadratic loss an optimizer diverges along an eigenvector once step size times eigenvalue exceeds a constant c that
depends only on the update rule. Full-batch training tends to settle there, at ratio 1; on small batches noise keeps it
below, and a ratio is information rather than an alarm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from monitor.curvature.lanczos import Eigenvalues, lanczos
from monitor.curvature.products import ClosureOperator, scaled
from monitor.errors import UsageError


def heavy_ball(momentum: float = 0.0, dampening: float = 0.0) -> float:
    """Largest stable η·λ of gradient descent (2) and heavy-ball momentum, (2 + 2β) / (1 − dampening).

    Source: Cohen et al. (2021), appendix B; dampening scales the gradient that enters the momentum.
    """
    return (2 + 2 * momentum) / (1 - dampening)


def nesterov(momentum: float) -> float:
    """Largest stable η·λ of Nesterov momentum, (2 + 2β) / (1 + 2β). Source: Cohen et al. (2021), appendix B."""
    return (2 + 2 * momentum) / (1 + 2 * momentum)


def averaged_gradient(beta1: float) -> float:
    """Largest stable η·λ when the step is an exponential mean of gradients, (2 + 2β₁) / (1 − β₁): 38 for β₁ = 0.9.

    Source: Cohen et al. (2022), Adaptive gradient methods at the edge of stability.
    """
    return (2 + 2 * beta1) / (1 - beta1)


def batch_eigenvalue(full: float, noise: float, batch: int, examples: int | None = None) -> float:
    """The largest eigenvalue expected of a batch's Hessian, of which the full-data one is inflated by sampling noise.

    The noise is taken for a Wigner matrix of spectral radius 2r: λ' = λ + r²/λ if λ > r, else the edge of the noise,
    2r, with r = ``noise``/√b and b = B / (1 − B/N).

    Args:
        full: λ, the eigenvalue over all data.
        noise: √P·s: root mean square of a coordinate of (H_i − H)z over examples i and random signs z, for one example.
        batch: B.
        examples: N, of which the batch is drawn without replacement; None: unlimited.

    Returns:
        λ', in the unit of ``full``; ``full`` for a batch of everything.

    Raises:
        UsageError: if the batch is not between 1 and ``examples``, or ``noise`` is negative.

    Source: Granziol, Zohren, Roberts (2022), Learning rates as a function of batch size. On a small network
        the inflation was found but not its 1/B (tests/curvature/test_reproductions.py): the Hessian's noise is no
        Wigner matrix there.
    """
    if batch < 1 or (examples is not None and batch > examples) or noise < 0:
        raise UsageError(f"batch={batch} of {examples}, noise={noise}; expected 1 <= batch <= examples and noise >= 0.")
    share = 1 - batch / examples if examples is not None else 1.0
    r = noise * (share / batch) ** 0.5
    return full + r**2 / full if full > r else 2 * r


def batch_learning_rate(rate: float, batch: int, other: int, *, adaptive: bool) -> float:
    """The learning rate at batch size ``other`` that keeps the stability that ``rate`` has at ``batch``.

    Linear in the batch for SGD, its square root for Adam, while the noise prevails over the full-data curvature.

    Source: Granziol, Zohren, Roberts (2022).
    """
    return rate * (other / batch) ** (0.5 if adaptive else 1.0)


@dataclass(frozen=True)
class UpdateRule:
    """What an optimizer does to each selected parameter, as far as stability goes.

    Attributes:
        scale: ``(n,)``, η / (c·P): zero where nothing is updated. Stable while λ_max of scale^½ H scale^½ is below 1.
        preconditioner: ``(n,)``, P, or None if it is 1 everywhere.
        learning_rate: η if it is the same everywhere, else None.
        threshold: c if it is the same everywhere, else None.
    """

    scale: Tensor
    preconditioner: Tensor | None
    learning_rate: float | None
    threshold: float | None


def update_rule(optimizer: Optimizer | Sequence[Optimizer], operator: ClosureOperator) -> UpdateRule:
    """Read step sizes, momentum and preconditioner from the real optimizer state.

    SGD: P = 1. Adam and AdamW: P = (1 − β₁ᵗ)(√(v / (1 − β₂ᵗ)) + ε). RMSprop: P = √v + ε, of the centred v if so set.
    Weight decay is no part of the loss and is left out.

    Args:
        optimizer: one or several of torch.optim's SGD, Adam, AdamW, RMSprop or their subclasses.
        operator: its parameters, in its order.

    Returns:
        The rule over the operator's flat vectors.

    Raises:
        UsageError: if the optimizer is of another kind, maximizes, updates none of the parameters, or keeps state it
            does not have yet.

    Cost: two vectors of n numbers.
    """
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    groups = {id(p): (o, group) for o in optimizers for group in o.param_groups for p in group["params"]}
    live = dict(operator.closure.named())
    scales, preconditioners, rates, thresholds = [], [], set(), set()
    for name, leaf in zip(operator.point.names, operator.point.leaves, strict=True):
        o, group = groups.get(id(live[name]), (None, {}))
        found = _precondition(o, group, o.state.get(live[name], {})) if o else None
        if found is None:
            scales.append(torch.zeros_like(leaf))
            preconditioners.append(torch.ones_like(leaf))
            continue
        P, c = found
        rate = float(group["lr"])
        rates.add(rate)
        thresholds.add(c)
        P = torch.ones_like(leaf) if P is None else P.to(leaf)
        preconditioners.append(P)
        scales.append(rate / (c * P))
    if not rates:
        raise UsageError(
            "the optimizer holds no state for, or does not update, any of the selected parameters; "
            "measure after its first step, or pass the optimizer of this model."
        )
    plain = all(_kind(o) == "SGD" for o in optimizers)
    return UpdateRule(
        operator.point.join(scales),
        None if plain else operator.point.join(preconditioners),
        rates.pop() if len(rates) == 1 else None,
        thresholds.pop() if len(thresholds) == 1 else None,
    )


def _kind(optimizer: Optimizer) -> str:
    for kind in type(optimizer).__mro__:
        if kind.__module__.startswith("torch.optim") and kind.__name__ in ("SGD", "Adam", "AdamW", "RMSprop"):
            return "Adam" if kind.__name__ == "AdamW" else kind.__name__
    raise UsageError(
        f"optimizer {type(optimizer).__name__} is not one whose stability is known here (SGD, Adam, AdamW, RMSprop); "
        "leave optimizer= out to measure the loss alone."
    )


def _precondition(
    optimizer: Optimizer, group: Mapping[str, Any], state: Mapping[str, Any]
) -> tuple[Tensor | None, float] | None:
    if group.get("maximize"):
        raise UsageError("the optimizer maximizes; stability is defined here for minimizing a loss.")
    kind = _kind(optimizer)
    if kind == "SGD":
        if group.get("nesterov"):
            return None, nesterov(group["momentum"])
        return None, heavy_ball(group["momentum"], group["dampening"])
    if not state:
        return None
    t = float(state["step"])
    if kind == "Adam":
        beta1, beta2 = (float(b) for b in group["betas"])
        v = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
        return (1 - beta1**t) * ((v / (1 - beta2**t)).sqrt() + group["eps"]), averaged_gradient(beta1)
    v = state["square_avg"]
    if group["centered"]:
        v = v - state["grad_avg"].square()
    return v.sqrt() + group["eps"], heavy_ball(group["momentum"])


@dataclass(frozen=True)
class Stability:
    """An optimizer against the curvature: 1 is the edge, above it the quadratic model of the loss diverges.

    Attributes:
        ratio: λ_max of scale^½ H scale^½ with scale = η / (c·P); η·λ_max / c for plain SGD.
        converged: whether that eigenvalue has.
        sharpness: λ_max of P^-½ H P^-½ (λ_max of H for SGD); None where learning rate or rule differ between groups.
        threshold: what ``sharpness`` may not exceed, c / η; None likewise.
        learning_rate: η; None likewise.
        largest_learning_rate: η at which ratio would be 1; None likewise, or where no direction curves upward.
        sgd_ratio: η·tr(H) / 2 for SGD without momentum, the bound of one-sample SGD at an interpolating minimum of a
            square loss; else None.
        products: products it took beyond those of the spectrum.
    """

    ratio: float
    converged: bool
    sharpness: float | None
    threshold: float | None
    learning_rate: float | None
    largest_learning_rate: float | None
    sgd_ratio: float | None
    products: int


def stability(
    operator: ClosureOperator,
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    top: Eigenvalues | None = None,
    trace: float | None = None,
    tol: float = 1e-3,
    seed: int = 0,
    max_products: int = 300,
    max_basis: int | None = None,
) -> Stability:
    """Where ``optimizer`` stands against the edge of stability on the loss of ``operator``.

    Args:
        operator: a `Hessian` (or `GaussNewton`).
        optimizer: one or several, with the state they have now.
        top: its largest eigenvalue if known; saves the products for plain SGD.
        trace: its trace if known, for ``sgd_ratio``.
        tol: relative tolerance of the eigenvalue.
        seed: of the start vector.
        max_products: as for `lanczos`.
        max_basis: as for `lanczos`.

    Returns:
        The ratio to the edge and what follows from it.

    Raises:
        UsageError: as `update_rule`.

    Source: Cohen et al. (2021, 2022); Wu and Su (2023) for ``sgd_ratio``.
    """
    rule = update_rule(optimizer, operator)
    uniform = rule.learning_rate is not None and rule.threshold is not None
    products = 0
    if uniform and rule.preconditioner is None and top is not None and bool((rule.scale > 0).all()):
        ratio, converged = rule.learning_rate / rule.threshold * float(top.values[0]), bool(top.converged[0])  # type: ignore[operator]
    else:
        run = lanczos(
            scaled(operator, rule.scale), 1, tol=tol, seed=seed, max_products=max_products, max_basis=max_basis
        )
        ratio, converged, products = float(run.largest.values[0]), bool(run.largest.converged[0]), run.products
    rate, c = rule.learning_rate, rule.threshold
    edge = c / rate if rate is not None and c is not None and rate > 0 else None
    plain = rule.preconditioner is None and c == heavy_ball()
    return Stability(
        ratio=ratio,
        converged=converged,
        sharpness=None if edge is None else ratio * edge,
        threshold=edge,
        learning_rate=rate,
        largest_learning_rate=rate / ratio if rate is not None and ratio > 0 else None,
        sgd_ratio=rate * trace / 2 if plain and rate is not None and trace is not None else None,
        products=products,
    )
