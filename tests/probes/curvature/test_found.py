"""What the rules say of the curvature of real trainings."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import monitor
from monitor.probes.curvature import Curvature
from tests.probes.curvature.runs import column


def descent(folder: Path, lr: float, steps: int, every: int) -> monitor.Run:
    """Full-batch gradient descent on digits, squared loss."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images[:256] / 16, dtype=torch.float32), torch.tensor(labels[:256])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))
    opt = torch.optim.SGD(model.parameters(), lr=lr)
    with monitor.attach(model, folder, curvature=Curvature(every=every, full=1000)):
        for _ in range(steps):
            opt.zero_grad()
            (5 * F.mse_loss(model(x), F.one_hot(y, 10).float())).backward()
            opt.step()
    return monitor.open(folder)


@pytest.mark.parametrize(
    ("lr", "steps", "every", "rule"), [(0.2, 400, 10, None), (0.8, 30, 3, "above_edge_of_stability")]
)
def test_what_full_batch_descent_shows(lr: float, steps: int, every: int, rule: str | None, tmp_path: Path) -> None:
    """Oracle: planted fault. At the edge nothing is said; above it, it is."""
    run = descent(tmp_path / "run", lr, steps, every)
    known = {"above_edge_of_stability", "catapult", "sharpness_blow_up", "learning_rate_too_small"}
    found = {f.rule for f in run.findings()} & known
    assert found == ({rule} if rule else set())
    if rule is None:  # gradient descent settles at 2/η (Cohen et al. 2021)
        assert 0.95 < np.mean(column(run, "edge_of_stability.ratio")[-10:]) < 1.15


def full_batch(
    folder: Path, model: nn.Module, loss: Callable[[], Tensor], lr: float, steps: int, every: int = 40
) -> set[str]:
    """Full-batch gradient descent; every measurement is full. What was found."""
    opt = torch.optim.SGD(model.parameters(), lr=lr)
    with monitor.attach(model, folder, curvature=Curvature(every=every, full=1)):
        for _ in range(steps):
            opt.zero_grad()
            loss().backward()
            opt.step()
    return {f.rule for f in monitor.open(folder).findings()}


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_a_saddle_is_found(scale: float, tmp_path: Path) -> None:
    """Oracle: planted fault. Weights a thousandth of the usual size hold gradient descent where it guesses."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images[:256] / 16, dtype=torch.float32), torch.tensor(labels[:256])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    found = full_batch(tmp_path / "run", model, lambda: F.cross_entropy(model(x), y), 0.05, 130)
    assert ("indefinite_curvature" in found) == (scale < 1)


@pytest.mark.parametrize("mean", [0.0, 10.0])
def test_one_direction_is_found(mean: float, tmp_path: Path) -> None:
    """Oracle: planted fault, closed form. The mean of inputs is an eigenvector of X'X, far sharper than the others."""
    torch.manual_seed(0)
    x, y = torch.randn(200, 8) + mean, torch.randn(200, 1)
    model = nn.Linear(8, 1)
    found = full_batch(tmp_path / "run", model, lambda: F.mse_loss(model(x), y), 1e-4, 100, 20)
    X = torch.cat([x, torch.ones(200, 1)], 1).double().numpy()
    first, second = np.linalg.eigvalsh(2 * X.T @ X / 200)[::-1][:2]
    assert ("ill_conditioned" in found) == (first / second > 10) == (mean > 0)


@pytest.mark.slow
@pytest.mark.parametrize(("lr", "patch"), [(0.4, True), (0.4, False), (0.1, True)])
def test_opposing_groups_are_found(lr: float, patch: bool, tmp_path: Path) -> None:
    """Oracle: planted fault. The training of the sample run, and without its bright corner or its large step."""
    script = runpy.run_path(str(Path(__file__).parents[3] / "sample_runs" / "opposing_signals.py"))
    script["main"](str(tmp_path / "run"), lr=lr, patch=patch, steps=400)
    found = {f.rule for f in monitor.open(tmp_path / "run").findings()}
    assert ("opposing_groups" in found) == (patch and lr == 0.4)
