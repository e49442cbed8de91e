from __future__ import annotations

import numpy as np
import pytest
import torch

from monitor.curvature import Operator, SpectralDensity, density, lanczos
from monitor.errors import UsageError


def diagonal(values) -> Operator:
    d = torch.as_tensor(np.asarray(values, dtype=np.float64))
    return Operator(lambda v: d * v, len(d), torch.float64)


def wasserstein(found: SpectralDensity, quantile) -> float:
    """Area between two distribution functions, the other one given by its quantile function."""
    p = (np.arange(20000) + 0.5) / 20000
    order = np.argsort(found.nodes)
    mine = found.nodes[order][np.searchsorted(np.cumsum(found.weights[order]), p * (1 - 1e-12))]
    return float(np.abs(mine - quantile(p)).mean())


def test_known_spectrum():
    """Oracle: closed form (the entries of a diagonal operator), as the distance between distributions."""
    values = np.sort(np.r_[20.0, 15.0, -6.0, np.random.default_rng(0).standard_normal(2000)])
    found = density(diagonal(values), steps=40, runs=4)
    assert found.weights.sum() == pytest.approx(1) and len(found.nodes) == 160 and found.n == 2003
    assert wasserstein(found, lambda p: values[(p * len(values)).astype(int)]) < 0.08  # half the nodes' mean spacing
    # an outlier is a node of its own, with the weight of one eigenvalue in n on average
    at = np.abs(found.nodes - 20) < 1e-6
    assert at.sum() == 4 and found.weights[at].sum() == pytest.approx(1 / 2003, rel=2.5)
    assert found.negative == pytest.approx((values < 0).mean(), abs=0.05)


def test_wishart_against_its_limit_law():
    """Oracle: closed form, the Marchenko–Pastur law: its moments, its support and its distribution function."""
    n, samples = 600, 1800
    ratio = n / samples
    B = torch.randn(samples, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    M = B.T @ B / samples
    found = density(Operator(lambda v: M @ v, n, torch.float64), steps=30, runs=8)
    exact = [1, 1 + ratio, 1 + 3 * ratio + ratio**2, 1 + 6 * ratio + 6 * ratio**2 + ratio**3]
    for order, moment in enumerate(exact, 1):
        per_start = [float(np.dot(w, t**order)) for t, w in found._runs()]
        stderr = np.std(per_start, ddof=1) / len(per_start) ** 0.5
        assert abs(found.moment(order) - moment) < 4 * stderr + 10 / n * moment
    low, high = (1 - ratio**0.5) ** 2, (1 + ratio**0.5) ** 2
    assert found.nodes.min() > low - 0.05 and found.nodes.max() < high + 0.05

    x = np.linspace(low, high, 4001)[1:-1]
    law = np.sqrt((high - x) * (x - low)) / (2 * np.pi * ratio * x)
    cdf = np.cumsum(law) * (x[1] - x[0])
    assert cdf[-1] == pytest.approx(1, abs=1e-3)
    assert wasserstein(found, lambda p: np.interp(p, cdf, x)) < 0.04
    smooth = found.at(x, width=0.12)
    inside = (x > low + 0.3) & (x < high - 0.3)  # away from the edges, where smoothing must differ
    assert np.abs(smooth - law)[inside].max() < 0.12 * law.max()


def test_moments_of_one_start_are_exact():
    """Oracle: closed form: Gauss quadrature with m nodes gives u'A^p u exactly up to p = 2m − 1."""
    values = np.random.default_rng(1).uniform(-1, 2, 300)
    k = lanczos(diagonal(values), steps=6, max_products=6)
    u = k.basis[0][0].numpy()
    for p in range(12):
        assert SpectralDensity.of([k], 300).moment(p) == pytest.approx(float(u**2 @ values**p), rel=1e-9)


def test_agrees_with_an_independent_library():
    """Oracle: independent library (curvlinops' spectral density), both smoothed, on one indefinite matrix."""
    curvlinops = pytest.importorskip("curvlinops")
    pytest.importorskip("curvlinops.examples")
    r = np.random.default_rng(5)
    A = r.standard_normal((400, 400))
    M = torch.from_numpy((A + A.T) / 40)
    torch.manual_seed(0)
    operator = curvlinops.examples.TensorLinearOperator(M)
    grid, theirs = curvlinops.lanczos_approximate_spectrum(operator, 40, num_repeats=8, kappa=1.05)
    theirs = np.asarray(theirs) / np.trapezoid(theirs, grid)
    ours = density(Operator(lambda v: M @ v, 400, torch.float64), steps=40, runs=8).at(np.asarray(grid), width=0.05)
    assert np.trapezoid(np.abs(ours - theirs), grid) < 0.12


def test_criteria():
    """Oracle: closed form (spec 5.8): θ {-1, 2, 8}, w {.1, .3, .6} gives r_e .125 and K_0.5 .106636."""
    d = SpectralDensity(np.array([-1.0, 2, 8]), np.array([0.1, 0.3, 0.6]), np.zeros(3, dtype=np.int64), 10)
    assert d.negative_ratio() == pytest.approx(0.125)
    assert d.negative_weight() == pytest.approx(0.106636, abs=1e-6)
    assert d.negative == pytest.approx(0.1) and d.below([-2, -1, 5, 9]).tolist() == pytest.approx([0, 0.1, 0.4, 1])
    two = SpectralDensity(np.tile(d.nodes, 2), np.tile(d.weights / 2, 2), np.repeat([0, 1], 3), 10)
    assert two.negative_weight() == pytest.approx(d.negative_weight()) and "2 starts" in repr(two)
    below = SpectralDensity(np.array([-1.0, 0]), np.array([0.5, 0.5]), np.zeros(2, dtype=np.int64), 2)
    assert below.negative_weight() == np.inf == below.negative_ratio()


def test_smoothed_density_integrates_to_one():
    """Oracle: closed form; a single node has a width of its own."""
    found = density(diagonal(np.random.default_rng(0).standard_normal(200)), steps=20)
    x = np.linspace(-10, 10, 20001)
    assert np.trapezoid(found.at(x), x) == pytest.approx(1, abs=1e-6)
    lone = density(diagonal(np.full(9, 2.0)), steps=3)
    x = np.linspace(1.9, 2.1, 20001)
    assert np.trapezoid(lone.at(x), x) == pytest.approx(1, abs=1e-3)


def test_messages():
    """Oracle: planted fault."""
    with pytest.raises(UsageError, match="at least 3 steps"):
        density(diagonal(np.ones(9)), steps=2)
