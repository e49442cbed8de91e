"""The density of an operator's eigenvalues, by stochastic Lanczos quadrature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from monitor.curvature.lanczos import Array, Krylov, lanczos
from monitor.curvature.products import Operator
from monitor.errors import UsageError


@dataclass(frozen=True, repr=False)
class SpectralDensity:
    """Where the eigenvalues lie: a weighted set of nodes whose weights sum to 1. Nothing is smoothed away.

    Attributes:
        nodes: ``(q,)``, in the operator's unit.
        weights: ``(q,)``; a node's share of all eigenvalues, averaged over runs.
        run: ``(q,)``, which start vector a node comes from.
        n: number of eigenvalues of the operator.
    """

    nodes: Array
    weights: Array
    run: npt.NDArray[np.int64]
    n: int

    @staticmethod
    def of(runs: Sequence[Krylov], n: int) -> SpectralDensity:
        """The density seen by one or more Lanczos runs on an operator of size ``n``."""
        index = np.concatenate([np.full(len(k.nodes), i, dtype=np.int64) for i, k in enumerate(runs)])
        nodes, weights = (np.concatenate(parts) for parts in ([k.nodes for k in runs], [k.weights for k in runs]))
        return SpectralDensity(nodes, weights / len(runs), index, n)

    def __repr__(self) -> str:
        runs = len(set(self.run.tolist()))
        return (
            f"SpectralDensity({len(self.nodes)} nodes from {runs} start{'s' if runs > 1 else ''}, "
            f"{self.nodes.min():.4g} to {self.nodes.max():.4g}, {self.negative:.1%} negative)"
        )

    @property
    def negative(self) -> float:
        """Share of the eigenvalues that is below zero, as far as the nodes resolve it."""
        return float(self.weights[self.nodes < 0].sum())

    def at(self, x: npt.ArrayLike, width: float | None = None) -> Array:
        """The density at ``x``, every node spread to a Gaussian: for plots.

        Args:
            x: any shape, in the operator's unit.
            width: standard deviation of the Gaussian. Default: 1 % of the range of the nodes.

        Returns:
            Density per unit of ``x``, same shape; its integral is 1.
        """
        x = np.asarray(x, dtype=np.float64)
        spread = float(np.ptp(self.nodes))
        width = width or 0.01 * spread or 1e-3 * max(abs(float(self.nodes[0])), 1e-12)
        u = (x[..., None] - self.nodes) / width
        return (np.exp(-0.5 * u * u) @ self.weights) / (width * (2 * np.pi) ** 0.5)

    def below(self, x: npt.ArrayLike) -> Array:
        """Share of the eigenvalues that is at most ``x`` (any shape): the distribution function, a staircase."""
        order = np.argsort(self.nodes)
        steps = np.concatenate([[0.0], np.cumsum(self.weights[order])])
        return steps[np.searchsorted(self.nodes[order], np.asarray(x), side="right")]

    def moment(self, order: int) -> float:
        """Mean of the eigenvalues' ``order``-th power; exact for each start up to order 2m − 1 with m nodes."""
        return float(self.weights @ self.nodes**order)

    def negative_ratio(self) -> float:
        """r_e = |θ_min / θ_max|, averaged over starts; comparable only at equal numbers of nodes.

        Source: criterion r_e of the LLA loss-landscape analysis; misleading where most eigenvalues are negative.
        """
        return float(np.mean([abs(t.min() / t.max()) if t.max() else np.inf for t, _ in self._runs()]))

    def negative_weight(self, power: float = 0.5) -> float:
        """K_n = Σ_{θ<0} (|θ| w)^n / Σ_{θ>0} (θ w)^n, averaged over starts; comparable only at equal numbers of nodes.

        Args:
            power: n.

        Returns:
            K_n; infinite where no node is positive.

        Source: criterion K_n of the LLA loss-landscape analysis.
        """

        def one(theta: Array, w: Array) -> float:
            below, above = ((np.abs(theta * w)[part] ** power).sum() for part in (theta < 0, theta > 0))
            return float(below / above) if above else np.inf

        return float(np.mean([one(t, w) for t, w in self._runs()]))

    def _runs(self) -> list[tuple[Array, Array]]:
        found = []
        for i in np.unique(self.run):
            w = self.weights[self.run == i]
            found.append((self.nodes[self.run == i], w / w.sum()))
        return found


def density(operator: Operator, *, steps: int = 40, runs: int = 1, seed: int = 0) -> SpectralDensity:
    """The spectral density of ``operator`` as nodes and weights.

    Each start vector u gives the Gauss quadrature of f ↦ u'f(A)u, whose mean over u is tr f(A)/n.

    Args:
        operator: the symmetric matrix.
        steps: products, and nodes, per start; outliers and the shape of the bulk need about 40.
        runs: number of independent starts; the error falls like 1/√(n·runs).
        seed: of the first start; the others follow.

    Returns:
        ``runs · steps`` nodes with their weights.

    Raises:
        UsageError: if ``steps`` is below 3 (or ``n``) or ``runs`` below 1.

    Source: Golub and Welsch (1969); Ghorbani, Krishnan, Xiao (2019) for neural networks.
    """
    if steps < min(3, operator.n) or runs < 1:
        raise UsageError(f"steps={steps}, runs={runs}; expected at least 3 steps and 1 run.")
    each = [lanczos(operator, steps=steps, max_products=steps, seed=seed + i) for i in range(runs)]
    return SpectralDensity.of(each, operator.n)
