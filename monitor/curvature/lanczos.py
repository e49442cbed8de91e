"""Extreme eigenvalues of a symmetric operator by Lanczos iteration, with an honest statement of how good they are.

The basis is kept orthogonal: its overlap with each new vector is measured, and taken out where it is more than rounding
explains. Coefficients and the projected matrix are float64, and the iteration stops when residual and agreement say so;
a cap on memory is kept by thick restarts (Wu and Simon 2000). One run gives the eigenvalues, the quadrature of the
spectral density, and a basis that the trace estimators deflate with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from monitor.curvature.precision import widest
from monitor.curvature.products import Operator
from monitor.errors import MonitorError, UsageError

Array = npt.NDArray[np.float64]
End = Literal["largest", "smallest"]

#: Above this, relative to the largest eigenvalue, an operator is not symmetric. Rounding in float32 gives 1e-6 to 1e-5;
#: a loss computed in bfloat16 autocast 5e-3 and more (measured on a small transformer).
ASYMMETRY = 1e-3

#: Largest mean residual of several eigenvalues, in units of their mean spacing. An eigenvalue at a distance d from an
#: estimate of residual r stays hidden if the start leans on it about r/d times as much, as r/d of random starts do. On
#: 25 laws of eigenvalues and the Hessians of six small networks, where it was chosen, the top 3 and top 5 were wrong in
#: .3 % of starts; in 1.2 and .7 % when each residual had to be a third of the tolerance, which took 4 to 8 % more
#: products of a network. On eight other spectra they are wrong in .5 and .2 %, where that rule had .3 and .1.
_APART = 0.002


@dataclass(frozen=True)
class Eigenvalues:
    """Estimates at one end of the spectrum, the extreme one first.

    Attributes:
        values: ``(k,)``. Each is a Rayleigh quotient: never beyond the extreme eigenvalue.
        residuals: ``(k,)``, ‖Av − θv‖: some eigenvalue lies within it of θ. At least 4 eps·‖A‖ and the asymmetry met.
        converged: ``(k,)`` bool: the residual and the change since the check before are within the tolerance.
    """

    values: Array
    residuals: Array
    converged: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        rows = zip(self.values, self.residuals, self.converged, strict=True)
        return "[" + ", ".join(f"{v:.6g} ±{r:.1g}{'' if c else ' (not converged)'}" for v, r, c in rows) + "]"


@dataclass(frozen=True, repr=False)
class Krylov:
    """The outcome of a `lanczos` run: an orthonormal basis V, the projection T = V'AV, and what follows from them.

    Attributes:
        largest: eigenvalues from the top.
        smallest: eigenvalues from the bottom.
        nodes: ``(m,)`` of the Gauss quadrature of the spectral density seen from the start vector.
        weights: ``(m,)``, summing to 1.
        T: ``(m, m)`` float64.
        remainder: norm of A V − V T, all of it in the last column.
        basis: V' in blocks of rows ``(·, n)``, orthonormal.
        products: products with the operator.
        restarts: thick restarts that the memory cap asked for.
        asymmetry: largest deviation of the operator from symmetry that the run met, relative to its largest eigenvalue.
    """

    largest: Eigenvalues
    smallest: Eigenvalues
    nodes: Array
    weights: Array
    T: Array
    remainder: float
    basis: list[Tensor]
    products: int
    restarts: int
    asymmetry: float

    def eigenvectors(self, end: End = "largest") -> Tensor:
        """Unit eigenvectors ``(k, n)`` of one end's estimates, in their order."""
        _, S = np.linalg.eigh(self.T)
        count = len(self.largest if end == "largest" else self.smallest)
        columns = S[:, ::-1][:, :count] if end == "largest" else S[:, :count]
        rows = torch.tensor(columns.T.copy(), dtype=self.basis[0].dtype, device=self.basis[0].device)
        found = torch.zeros(count, self.basis[0].shape[1], dtype=rows.dtype, device=rows.device)
        for part, block in zip(rows.split([len(b) for b in self.basis], 1), self.basis, strict=True):
            found.addmm_(part, block)
        return found

    def deflate(self, z: Tensor) -> Tensor:
        """``z`` ``(n,)`` without its part in the span of V."""
        z = z.clone()
        for _ in range(2):  # the second pass takes out what rounding in the first put back
            _take_out(self.basis, z)
        return z


def lanczos(
    operator: Operator,
    largest: int = 1,
    smallest: int = 0,
    *,
    tol: float = 1e-3,
    steps: int = 0,
    max_products: int = 300,
    start: Tensor | None = None,
    seed: int = 0,
    max_basis: int | None = None,
) -> Krylov:
    """The ``largest`` and ``smallest`` eigenvalues of ``operator``, each with its residual and whether it converged.

    An estimate θ has converged when its residual is at most ``tol·|θ|`` (plus the rounding error of the operator's
    dtype, 10 eps·‖A‖) **and** two successive checks agree within ``tol·|θ|``; the run stops when all asked for have.
    Both are needed: agreement alone let 0.7 % of starts through with errors of up to 26 %. If several are wanted, their
    mean residual must also be at most 0.2 % of their mean spacing (``2·tol`` of it if that is more), so that hardly any
    eigenvalue between them is passed over; their own errors are far smaller by then. The start is Gaussian: random
    signs can be orthogonal to an eigenvector on few coordinates.

    Args:
        operator: the symmetric matrix.
        largest: how many from the top; at most ``operator.n`` are returned.
        smallest: how many from the bottom (most negative first).
        tol: relative tolerance.
        steps: at least so many products, for a spectral density of so many nodes.
        max_products: stop here, converged or not.
        start: ``(n,)`` or ``(k, n)``, eigenvectors of an earlier measurement, which save 15 to 25 % of the products.
            The random part prevails, so that a new largest eigenvalue is not missed.
        seed: of the random start.
        max_basis: vectors of ``n`` numbers that may be kept; thick restart beyond, and no more nodes than this.

    Returns:
        The eigenvalues and all else the run has to offer. Multiple eigenvalues are found once, unless the operator has
        few distinct ones.

    Raises:
        UsageError: if counts or the memory cap make no sense.
        MonitorError: if a product is not finite.

    Cost: one product and 2·n·m flops a step, where the basis is losing orthogonality 4·n·m every other step,
        m ≤ ``max_basis``; three or four small reads from the device a step.
    Source: Golub and Van Loan, Matrix Computations §10; Simon (1984), The Lanczos algorithm with partial
        reorthogonalization; Wu and Simon (2000) for the restart.
    """
    n = operator.n
    largest, smallest = min(largest, n), min(smallest, n)
    if largest + smallest < 1 or min(largest, smallest) < 0:
        raise UsageError(f"largest={largest}, smallest={smallest}; expected at least one eigenvalue in all.")
    room = min(n, max_products, max_basis or n)
    if room < min(n, largest + smallest + 2):
        raise UsageError(
            f"room for {room} basis vectors (max_basis={max_basis}, max_products={max_products}) with "
            f"{largest + smallest} eigenvalues wanted; expected at least {largest + smallest + 2}."
        )
    generator = torch.Generator(device=operator.device).manual_seed(seed)
    run = _Run(operator, largest, smallest, tol, room, generator)
    with operator.session():
        return run(_start(operator, start, generator), steps, max_products)


def _start(operator: Operator, start: Tensor | None, generator: torch.Generator) -> Tensor:
    v = torch.randn(operator.n, dtype=operator.dtype, device=operator.device, generator=generator)
    if start is None:
        return v / _norm(v)
    if start.shape[-1:] != (operator.n,) or start.dim() > 2:
        raise UsageError(f"start has shape {tuple(start.shape)}; expected ({operator.n},) or (k, {operator.n}).")
    old = start.to(operator.device, operator.dtype).reshape(-1, operator.n).sum(0)
    # Mostly random: from a tenth as much as the old eigenvector, an eigenvalue that had overtaken its own by 10 % was
    # missed in 36 % of starts, from as much in 0 to 9 %, from three times as much in 0 to 3 %, at random in under 1 %.
    v = old / old.norm() + 3 * v / v.norm()
    return v / _norm(v)


#: A running sum of a million float32 is good to 1e-4 only; vectors of that length would leave each other.
_PIECE = 1 << 16


def _dot(a: Tensor, b: Tensor) -> float:
    if len(a) <= _PIECE or (a.device.type != "cpu" and widest(a.device) == torch.float64):
        return float(a @ b)
    sums = torch.stack([x @ y for x, y in zip(a.split(_PIECE), b.split(_PIECE), strict=True)])
    return float(sums.cpu().double().sum())


def _norm(a: Tensor) -> float:
    return _dot(a, a) ** 0.5


class _Basis:
    """Orthonormal rows, allocated in blocks as they come."""

    _BLOCK = 16

    def __init__(self, n: int, dtype: torch.dtype, device: torch.device):
        self._blocks: list[Tensor] = []
        self._n, self._dtype, self._device = n, dtype, device
        self.size = 0

    def append(self, v: Tensor, length: float) -> None:
        """Take in ``v / length``, written in place: a new vector of a million numbers costs six times as much."""
        if self.size == self._BLOCK * len(self._blocks):
            self._blocks.append(torch.empty(self._BLOCK, self._n, dtype=self._dtype, device=self._device))
        torch.div(v, length, out=self._blocks[-1][self.size % self._BLOCK])
        self.size += 1

    def __getitem__(self, i: int) -> Tensor:
        return self._blocks[i // self._BLOCK][i % self._BLOCK]

    def rows(self) -> list[Tensor]:
        return [b[: min(self._BLOCK, self.size - i * self._BLOCK)] for i, b in enumerate(self._blocks)]

    def rotate(self, S: Array) -> None:
        """Replace the rows by ``S'`` times them; ``S`` is ``(size, kept)``."""
        rows = torch.tensor(S.T.copy(), dtype=self._dtype, device=self._device)
        for start in range(0, self._n, 1 << 16):  # by columns, so that no second basis is allocated
            part = slice(start, start + (1 << 16))
            new = rows @ torch.cat([b[:, part] for b in self.rows()])
            for i, row in enumerate(new):
                self[i][part] = row
        self.size = S.shape[1]
        del self._blocks[-(-self.size // self._BLOCK) or 1 :]


def _overlaps(basis: list[Tensor], w: Tensor) -> list[Tensor]:
    if len(w) <= _PIECE or widest(w.device) == torch.float64:
        return [rows @ w for rows in basis]
    # Of a device without float64 nobody knows how it sums up a product as long as this.
    parts = w.split(_PIECE)
    return [torch.stack([r @ x for r, x in zip(rows.split(_PIECE, 1), parts, strict=True)]).sum(0) for rows in basis]


def _take_out(basis: list[Tensor], w: Tensor, overlaps: list[Tensor] | None = None) -> None:
    """One Gram–Schmidt pass on ``w``, in place, against all rows."""
    for rows, c in zip(basis, overlaps or _overlaps(basis, w), strict=True):
        w.addmv_(rows.T, c, alpha=-1)


_NONE = Eigenvalues(np.empty(0), np.empty(0), np.empty(0, dtype=np.bool_))


class _Run:
    def __init__(
        self, operator: Operator, largest: int, smallest: int, tol: float, room: int, generator: torch.Generator
    ):
        self.operator = operator
        self.ends = {end: count for end, count in (("largest", largest), ("smallest", smallest)) if count}
        self.tol = tol
        self.room = room
        self.generator = generator
        self.eps = torch.finfo(operator.dtype).eps
        # Up to √eps the projection is as good as with an orthogonal basis (Simon 1984); the margin below that is for
        # those who use the basis itself.
        self.overlap = self.eps**0.75

    def __call__(self, start: Tensor, steps: int, max_products: int) -> Krylov:
        n, wanted = self.operator.n, sum(self.ends.values())
        basis = _Basis(n, self.operator.dtype, self.operator.device)
        basis.append(start, 1.0)
        w = torch.empty_like(start)
        T = np.zeros((self.room, self.room))
        quadrature: tuple[Array, Array] | None = None
        found: dict[str, Eigenvalues] = {}
        products = restarts = 0
        before = now = 1.0  # how far the last two vectors lean on the others, if known
        asymmetry, scale = 0.0, 0.0
        theta, S = np.zeros(1), np.eye(1)
        while True:
            j = basis.size - 1
            v = basis[j]
            product = self.operator(v).detach()
            products += 1
            # First what the steps before predict, and the diagonal; this leaves rounding, which grows from step to
            # step. Then everything, where it has grown, so that the basis stays orthogonal.
            diagonal = _dot(v, product)
            torch.add(product, v, alpha=-diagonal, out=w)
            del product
            for i in np.flatnonzero(T[j, :j]).tolist():
                w.add_(basis[i], alpha=-T[j, i])
            beta = _norm(w)
            if not np.isfinite(beta):
                raise MonitorError(
                    f"product {products} with {self.operator.name} is not finite; curvature is not defined here. "
                    "Measure at a step where loss and gradient are finite."
                )
            rows = basis.rows()
            m = j + 1
            exact = m == n
            full, last = m == self.room and not exact, exact or products == max_products
            # After a vector that leans on no other, w leans as far as the one before it did, and by rounding.
            lean = float(np.abs(T[j, :j]).max(initial=0.0)) * before + self.eps * scale
            if now > 0 or full or lean > self.overlap * beta:
                overlaps = _overlaps(rows, w)
                rest = torch.cat(overlaps).cpu().double().numpy()
                # 0 in exact arithmetic if symmetric
                asymmetry = max(asymmetry, float(np.abs(rest[:j]).max(initial=0.0)))
                lean = float(np.abs(rest).max())
                if lean > self.overlap * beta:
                    _take_out(rows, w, overlaps)
                    beta = _norm(w)
                    diagonal += rest[j]
                    lean = 0.0
            T[j, j] = diagonal
            if exact:
                beta = 0.0
            # Every product while that is cheap beside the work on the vectors, else every third.
            due = products >= steps and m > wanted and (m <= 20 or m**3 <= n or products % 3 == 0)
            if due or full or last:
                theta, S = np.linalg.eigh(T[:m, :m])
                scale = max(scale, float(np.abs(theta).max()))
                found = {
                    end: self._estimate(end, theta, S, beta, scale, asymmetry, exact, found.get(end))
                    for end in self.ends
                }
                settled = products >= steps and all(bool(e.converged.all()) for e in found.values())
                if settled or last:
                    break
            else:
                scale = max(scale, abs(T[j, j]), beta)
            if beta <= 10 * self.eps * scale:  # the span is invariant: go on outside it
                beta = 0.0
                w.normal_(generator=self.generator)
                for _ in range(2):
                    _take_out(rows, w)
                length, lean = _norm(w), 0.0
            else:
                length = beta
            if full:
                if quadrature is None:
                    quadrature = theta, S[0] ** 2
                keep = self._keep(theta)
                basis.rotate(S[:, keep])
                T[:] = 0.0
                T[range(len(keep)), range(len(keep))] = theta[keep]
                coupling = beta * S[-1, keep]
                restarts += 1
            else:
                coupling = np.zeros(m)
                coupling[-1] = beta
            basis.append(w, length)
            before, now = 1.0 if full else now, lean / length
            j = basis.size - 1
            T[j, :j] = T[:j, j] = coupling
        nodes, weights = quadrature or (theta, S[0] ** 2)
        return Krylov(
            largest=found.get("largest", _NONE),
            smallest=found.get("smallest", _NONE),
            nodes=nodes,
            weights=weights,
            T=T[:m, :m].copy(),
            remainder=beta,
            basis=basis.rows(),
            products=products,
            restarts=restarts,
            asymmetry=asymmetry / scale if scale > 0 else 0.0,
        )

    def _estimate(
        self,
        end: str,
        theta: Array,
        S: Array,
        beta: float,
        scale: float,
        asymmetry: float,
        exact: bool,
        before: Eigenvalues | None,
    ) -> Eigenvalues:
        count = min(self.ends[end], len(theta))
        picked = np.arange(len(theta))[::-1][:count] if end == "largest" else np.arange(count)
        values = theta[picked]
        residuals = np.abs(beta * S[-1, picked])
        rounding = 10 * self.eps * scale
        close = residuals <= self.tol * np.abs(values) + rounding
        if sum(self.ends.values()) > 1:
            gaps = np.abs(np.diff(theta[::-1] if end == "largest" else theta))[:count]
            with np.errstate(divide="ignore"):  # neighbours within the tolerance are as good as one another
                spacing = 1 / np.mean(1 / np.maximum(gaps, self.tol * np.abs(values[: len(gaps)])))
            close &= residuals.mean() <= max(_APART, 2 * self.tol) * spacing + rounding
        agreed = np.zeros(count, dtype=np.bool_)
        if before is not None and len(before) == count:
            agreed = np.abs(values - before.values) <= self.tol * np.abs(values) + rounding
        # No better than rounding, and than what was taken out of the basis without a place in the projected matrix.
        residuals = np.maximum(residuals, max(4 * self.eps * scale, asymmetry))
        return Eigenvalues(values, residuals, close & (agreed | exact))

    def _keep(self, theta: Array) -> npt.NDArray[np.intp]:
        # Half the basis, the wanted ends first: what is thrown away has to be found again.
        spare = (self.room - sum(self.ends.values()) - 1) // 2
        kept = {end: count + spare // len(self.ends) for end, count in self.ends.items()}
        return np.r_[0 : kept.get("smallest", 0), len(theta) - kept.get("largest", 0) : len(theta)]
