"""Everything about the curvature of a loss in one call."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from monitor.curvature.closure import LossClosure, Selection
from monitor.curvature.density import SpectralDensity
from monitor.curvature.environment import Mode
from monitor.curvature.lanczos import ASYMMETRY, Eigenvalues, lanczos
from monitor.curvature.products import ClosureOperator, EmpiricalFisher, Fisher, GaussNewton, Hessian
from monitor.curvature.stability import Stability, stability
from monitor.curvature.trace import Estimate, traces
from monitor.errors import UsageError

Matrix = Literal["hessian", "gauss_newton", "fisher", "empirical_fisher"]

_OPERATORS: Mapping[str, type[ClosureOperator]] = {
    kind.name: kind for kind in (Hessian, GaussNewton, Fisher, EmpiricalFisher)
}


@dataclass(frozen=True, repr=False)
class Spectrum:
    """The spectrum of one operator at one point, and how far each number may be trusted.

    Attributes:
        operator: ``"hessian"``, ``"gauss_newton"``, ``"fisher"`` or ``"empirical_fisher"``.
        n: parameters measured.
        loss: the mean loss there.
        largest: eigenvalues from the top; the first is the sharpness.
        smallest: eigenvalues from the bottom.
        trace: sum of the eigenvalues, None if not asked for.
        frobenius: root of the sum of their squares, None likewise.
        density: where they all lie, None likewise.
        stability: the optimizer against the curvature, if one was given.
        eigenvectors: ``(k, n)`` of ``largest``, on the operator's device: a warm start for the next measurement.
        examples: size of the batch, None if unknown.
        products: products with the operator.
        seconds: wall time.
        way: how Hessian products were formed; None for the other operators.
        seed: of all that is random.
        unused: parameters that the loss does not depend on.
        notes: whatever limits the numbers above, in words.
    """

    operator: str
    n: int
    loss: float
    largest: Eigenvalues
    smallest: Eigenvalues
    trace: Estimate | None
    frobenius: Estimate | None
    density: SpectralDensity | None
    stability: Stability | None
    eigenvectors: Tensor
    examples: int | None
    products: int
    seconds: float
    way: str | None
    seed: int
    unused: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def sharpness(self) -> float:
        """The largest eigenvalue."""
        return float(self.largest.values[0])

    @property
    def converged(self) -> bool:
        """Whether every eigenvalue asked for has converged."""
        return bool(self.largest.converged.all() and self.smallest.converged.all())

    def __repr__(self) -> str:
        of = f" of {self.examples} examples" if self.examples is not None else ""
        lines = [
            f"Spectrum of the {self.operator.replace('_', ' ')}: {self.n:,} parameters, loss {self.loss:.6g}{of}",
            f"  largest    {self.largest}",
        ]
        if len(self.smallest):
            lines.append(f"  smallest   {self.smallest}")
        for name, estimate in (("trace", self.trace), ("Frobenius", self.frobenius), ("density", self.density)):
            if estimate is not None:
                lines.append(f"  {name:<10} {estimate}")
        if self.stability is not None:
            s = self.stability
            detail = f" (sharpness {s.sharpness:.5g} against {s.threshold:.5g})" if s.sharpness and s.threshold else ""
            lines.append(f"  stability  {s.ratio:.3f} of the edge{detail}")
        way = f", {self.way}" if self.way else ""
        lines.append(f"  cost       {self.products} products, {self.seconds:.2f} s{way}, seed {self.seed}")
        return "\n".join(lines + [f"  note       {note}" for note in self.notes])


def spectrum(
    model: nn.Module,
    loss: LossClosure | Callable[..., Any] | None = None,
    batch: Any = None,
    *,
    operator: Matrix = "hessian",
    parameters: Selection = None,
    top: int = 5,
    bottom: int = 1,
    tol: float = 1e-3,
    steps: int = 40,
    runs: int = 1,
    samples: int = 10,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    start: Spectrum | Tensor | None = None,
    mode: Mode = "eval",
    dtype: torch.dtype | None = None,
    max_products: int = 100,
    memory: float = 4e9,
    seed: int = 0,
) -> Spectrum:
    """Eigenvalues, trace, Frobenius norm and spectral density of a loss's curvature, each with its error.

    ::

        spectrum(model, F.cross_entropy, (x, y))
        spectrum(model, batch={"input_ids": ids, "labels": ids})           # a model that returns its loss
        spectrum(model, lambda: F.cross_entropy(model(x), y) + penalty(model))

    Training is not disturbed: parameters, gradients, buffers, modes and random numbers are bit for bit what they were.

    Args:
        model: the model.
        loss: a loss function for ``batch``, a closure, or a `LossClosure` (for several batches or ranks).
        batch: the data; see `LossClosure` for its forms.
        operator: whose spectrum.
        parameters: names of parameters or modules; default all trainable.
        top: how many of the largest eigenvalues.
        bottom: how many of the smallest.
        tol: relative tolerance of the eigenvalues.
        steps: nodes of the spectral density per start, at least 3; 0 leaves the density out.
        runs: starts for the spectral density.
        samples: products spent on trace and Frobenius norm, at least 2; 0 leaves them out.
        optimizer: compare its step size with the edge of stability.
        start: an earlier spectrum of these parameters, or vectors ``(k, n)``: a warm start.
        mode: ``"eval"`` or ``"train"``, see `LossClosure`.
        dtype: precision, e.g. ``torch.float64``; default the model's own.
        max_products: for one start; what has not converged by then is returned and says so.
        memory: bytes that the Lanczos basis may take; it restarts beyond.
        seed: of all that is random.

    Returns:
        The spectrum.

    Raises:
        UsageError: if arguments contradict each other, or the loss does not lend itself to second derivatives.
        MonitorError: if a product is not finite, or no way to form Hessian products works.

    Cost: about ``max(steps, 10 to 60) + (runs − 1)·steps + samples`` products, each about two gradients.
    """
    began = time.perf_counter()
    if isinstance(loss, LossClosure):
        if batch is not None:
            raise UsageError("a LossClosure already has its data; leave batch out.")
        closure = loss
    else:
        closure = LossClosure(model, loss, batch, mode=mode, dtype=dtype)
    if operator not in _OPERATORS:
        raise UsageError(f"operator={operator!r}; expected one of {', '.join(_OPERATORS)}.")
    matrix = _OPERATORS[operator](closure, parameters)
    bytes_each = matrix.n * torch.finfo(matrix.dtype).bits // 8
    basis = max(top + bottom + 10, int(memory // bytes_each))
    steps = min(steps, matrix.n, max_products)
    with matrix.session():
        value = closure.value(matrix.point)
        first = lanczos(
            matrix,
            top,
            bottom,
            tol=tol,
            steps=steps,
            max_products=max_products,
            start=start.eigenvectors if isinstance(start, Spectrum) else start,
            seed=seed,
            max_basis=basis,
        )
        # A warm start sees the density from the old eigenvectors; only a random one sees it without prejudice.
        seeds = range(seed + 1, seed + runs + (start is not None)) if steps else ()
        more = [lanczos(matrix, steps=steps, max_products=steps, max_basis=basis, seed=s) for s in seeds]
        starts = more if start is not None else [first, *more]
        trace, frobenius = traces(matrix, first, samples=samples, seed=seed) if samples else (None, None)
        symmetric = first.asymmetry <= ASYMMETRY
        largest, smallest = (e if symmetric else _doubtful(e) for e in (first.largest, first.smallest))
        edge = None
        if optimizer is not None:
            edge = stability(
                matrix,
                optimizer,
                top=largest if top else None,
                trace=trace.value if trace else None,
                tol=tol,
                seed=seed,
                max_products=max_products,
                max_basis=basis,
            )
    sampled, compared = trace.samples if trace else 0, edge.products if edge else 0
    products = first.products + sum(k.products for k in more) + sampled + compared
    notes = []
    if not symmetric:
        notes.append(
            f"the operator is not symmetric (by {first.asymmetry:.1g} of its largest eigenvalue), so trust no number. "
            "Is the loss the same function every time, and in full precision (no autocast inside the closure)?"
        )
    elif not (largest.converged.all() and smallest.converged.all()):
        notes.append(f"not everything converged in {first.products} products; raise max_products.")
    if first.restarts:
        notes.append(f"{first.restarts} restarts kept the basis within {memory / 1e9:.3g} GB; raise memory= for fewer.")
    unused = matrix.unused if isinstance(matrix, Hessian) else ()
    if unused:
        more_names = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        notes.append(f"the loss does not depend on {', '.join(unused[:3])}{more_names}; their curvature is zero.")
    return Spectrum(
        operator=operator,
        n=matrix.n,
        loss=value,
        largest=largest,
        smallest=smallest,
        trace=trace,
        frobenius=frobenius,
        density=SpectralDensity.of(starts, matrix.n) if steps else None,
        stability=edge,
        eigenvectors=first.eigenvectors("largest"),
        examples=closure.size,
        products=products,
        seconds=time.perf_counter() - began,
        way=matrix.way if isinstance(matrix, Hessian) else None,
        seed=seed,
        unused=unused,
        notes=tuple(notes),
    )


def block_spectra(
    model: nn.Module,
    loss: LossClosure | Callable[..., Any] | None = None,
    batch: Any = None,
    *,
    blocks: Sequence[str] | None = None,
    **options: Any,
) -> dict[str, Spectrum]:
    """The spectrum of every diagonal block of the curvature: one module's parameters at a time, the others held.

    Args:
        model: the model.
        loss: as for `spectrum`.
        batch: as for `spectrum`.
        blocks: names of modules or parameters. Default: the model's children with trainable parameters, and in place of
            a ModuleList, ModuleDict or Sequential its members.
        **options: as for `spectrum`.

    Returns:
        A spectrum for each block, in the model's order.

    Raises:
        UsageError: as `spectrum`.

    Cost: as many measurements as blocks, each as cheap as its block's share of the backward pass allows.
    """
    closure = loss
    if not isinstance(closure, LossClosure):
        made = {key: options.pop(key) for key in ("mode", "dtype") if key in options}
        closure = LossClosure(model, closure, batch, **made)
    if blocks is None:
        blocks = _blocks(closure.model, "")
    return {block: spectrum(model, closure, parameters=block, **options) for block in blocks}


def _blocks(module: nn.Module, prefix: str) -> list[str]:
    found = []
    for name, child in module.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            found += _blocks(child, f"{prefix}{name}.")
        elif any(p.requires_grad for p in child.parameters()):
            found.append(prefix + name)
    return found


def _doubtful(e: Eigenvalues) -> Eigenvalues:
    return replace(e, converged=np.zeros_like(e.converged))
