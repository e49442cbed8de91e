"""The Jacobian of many numbers, one for each example, and the spread of its singular values.

With J's rows the gradients of the examples' losses, JJ' says how many of them can be lowered independently of one
another: a wide spread of singular values is a badly conditioned fit, where some examples are learnt last or never.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from monitor.curvature.closure import LossClosure, Point, Selection
from monitor.curvature.lanczos import Array
from monitor.errors import UsageError


@dataclass(frozen=True, repr=False)
class SingularValues:
    """The singular values of a matrix, the largest first, and where rounding makes them meaningless.

    Attributes:
        values: ``(min(rows, columns),)``, in the matrix's unit.
        cutoff: values up to this are rounding: they count as zero.
    """

    values: Array
    cutoff: float

    def __repr__(self) -> str:
        return (
            f"SingularValues({len(self.values)}, largest {self.values[0]:.4g}, rank {self.rank}, "
            f"effective rank {self.effective_rank:.3g}, condition {self.condition:.3g})"
        )

    @property
    def rank(self) -> int:
        """How many are above `cutoff`."""
        return int((self.values > self.cutoff).sum())

    @property
    def effective_rank(self) -> float:
        """The exponential of the entropy of σ / Σσ: between 1 and `rank`; NaN of a zero matrix.

        Source: Roy and Vetterli (2007).
        """
        p = self.values[: self.rank] / self.values[: self.rank].sum()
        return float(np.exp(-(p * np.log(p)).sum())) if self.rank else float("nan")

    @property
    def condition(self) -> float:
        """κ = λ_max / λ_min⁺ = (σ_max / σ_min⁺)² of the Gram matrix, over the values above `cutoff`; NaN if none is.

        Source: Schaeffer et al. (2023), Double descent demystified: test error peaks where this does, if the fit has
        converged in the smallest direction.
        """
        return float((self.values[0] / self.values[self.rank - 1]) ** 2) if self.rank else float("nan")


def singular_values(matrix: Tensor) -> SingularValues:
    """The singular values of a matrix: of features ``(examples, features)``, say.

    Args:
        matrix: ``(rows, columns)``, any real dtype and device.

    Returns:
        Its min(rows, columns) singular values.

    Raises:
        UsageError: if it is no matrix, is empty or holds a value that is not finite.

    Cost: the Gram matrix of the shorter side and its eigenvalues, in float64 on the CPU; no copy of the whole.
    """
    if matrix.dim() != 2 or not matrix.numel():
        raise UsageError(f"matrix has shape {tuple(matrix.shape)}; expected (rows, columns), none of them zero.")
    return _of_rows(matrix if len(matrix) <= matrix.shape[1] else matrix.T)[0]


def _of_rows(matrix: Tensor) -> tuple[SingularValues, Array]:
    """The singular values of ``(rows, columns)`` by the Gram matrix of its rows, and the left vectors ``(rows, q)``."""
    gram = torch.zeros(len(matrix), len(matrix), dtype=torch.float64)
    for part in matrix.detach().split(1 << 16, 1):  # in pieces, so that the float64 copy stays small
        piece = part.cpu().double()
        gram.addmm_(piece, piece.T)
    if not bool(torch.isfinite(gram).all()):
        raise UsageError("the matrix holds values that are not finite; its singular values are not defined.")
    squares, vectors = np.linalg.eigh(gram.numpy())
    q = min(matrix.shape)
    values = np.sqrt(np.maximum(squares[::-1][:q], 0.0))
    # A perturbation of relative size eps per entry moves σ by up to √rows·eps·σ_max; the Gram matrix has squared it.
    rows, eps = len(matrix), torch.finfo(matrix.dtype).eps
    cutoff = values[0] * max(rows**0.5 * eps, (rows * np.finfo(np.float64).eps) ** 0.5)
    return SingularValues(values, float(cutoff)), vectors[:, ::-1][:, :q]


@dataclass(frozen=True, repr=False)
class Jacobian:
    """Gradients of many numbers with respect to one point's parameters: J = U·diag(σ)·V'.

    Attributes:
        rows: ``(B, n)``, J: one gradient a row.
        singular: its singular values σ.
        left: ``(B, min(B, n))``, U: which numbers move together, in the order of σ.
    """

    rows: Tensor
    singular: SingularValues
    left: Array

    def __repr__(self) -> str:
        return f"Jacobian({len(self.rows)} × {self.rows.shape[1]:,}, {self.singular})"

    def step(self, residuals: Tensor, rank: int | None = None) -> Tensor:
        """The smallest step −J⁺r that takes all residuals to zero, to first order, in J's ``rank`` largest directions.

        Args:
            residuals: r, ``(B,)``.
            rank: how many singular values are inverted; default and at most `SingularValues.rank`.

        Returns:
            ``(n,)``, in the dtype of J.

        Raises:
            UsageError: if the residuals do not fit.

        Source: Sven: Singular value descent, the truncated pseudo-inverse of the loss Jacobian.
        """
        if residuals.shape != (len(self.rows),):
            raise UsageError(f"residuals have shape {tuple(residuals.shape)}; expected ({len(self.rows)},).")
        kept = min(self.singular.rank, self.singular.rank if rank is None else rank)
        U, s = self.left[:, :kept], self.singular.values[:kept]
        weights = U @ ((U.T @ residuals.detach().cpu().double().numpy()) / s**2)  # J⁺ = J'·U·σ⁻²·U'
        return -(self.rows.T @ torch.from_numpy(weights).to(self.rows))


def jacobian(
    closure: LossClosure, parameters: Selection = None, *, of: Literal["losses", "outputs"] = "losses"
) -> Jacobian:
    """The Jacobian of every example's loss, or of every output, at the point where the model is.

    `monitor.probes.JacobianSpectrum` records the singular values of that of the losses during training.

    Args:
        closure: built from (model, loss_fn, batch). An example is one index of the outputs' first dimension.
        parameters: which parameters; default all trainable.
        of: ``"losses"``: row i is ∇ℓ_i, the loss being the plain mean over examples. ``"outputs"``: a row for each
            number the model puts out, examples first, so that JJ' is the empirical neural tangent kernel.

    Returns:
        The Jacobian, which holds all rows: B · n numbers.

    Raises:
        UsageError: if the closure is plain, or the outputs do not depend on the parameters.

    Cost: one backward pass a row.
    """
    J = jacobian_rows(closure, parameters, of)
    return Jacobian(J, *_of_rows(J))


def jacobian_rows(closure: LossClosure, parameters: Selection, of: Literal["losses", "outputs"]) -> Tensor:
    """J itself ``(B, n)``; see `jacobian`."""
    if of not in ("losses", "outputs"):
        raise UsageError(f'of={of!r}; expected "losses" or "outputs".')
    if closure.plain:
        raise UsageError("jacobian needs the model's outputs, which a plain closure hides; pass a batch.")
    point, found = closure.point(parameters), []
    with closure.session(point):
        for batch in closure.batches:
            given = closure.outputs(batch)
            outputs = [t for t in tree_leaves(given) if isinstance(t, Tensor) and t.requires_grad]
            if not outputs:
                raise UsageError("the model's outputs do not depend on the selected parameters; select others.")
            if of == "losses":  # ∇ℓ_i = N·J_i'·∂L/∂z_i, so these sums have the examples' gradients
                slopes = torch.autograd.grad(
                    batch.loss_of(given), outputs, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                outputs = [
                    (len(z) * g * z).reshape(len(z), -1).sum(1, True) for g, z in zip(slopes, outputs, strict=True)
                ]
                outputs = [torch.stack(outputs).sum(0)]
            found.append(gradients(torch.cat([z.reshape(len(z), -1) for z in outputs], 1), point))
    return torch.cat(found)


def gradients(numbers: Tensor, point: Point) -> Tensor:
    """The gradient of each of some numbers, inside a session at ``point``.

    Args:
        numbers: any shape, B of them, with a graph; it is kept.
        point: whose leaves they depend on.

    Returns:
        ``(B, n)``, in the dtype and on the device of the point; zero where a number does not depend on a leaf.

    Cost: one backward pass each.
    """
    found = torch.empty(numbers.numel(), point.n, dtype=point.dtype, device=point.device)
    for row, number in zip(found, numbers.reshape(-1), strict=True):
        parts = torch.autograd.grad(number, point.leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
        row.copy_(point.join(parts))
    return found
