"""What is recorded of the curvature of a run is right."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import monitor
from monitor.probes.curvature import Curvature
from tests.probes.curvature.runs import column, dense
from tests.record import trainings


def test_linear_regression(tmp_path: Path) -> None:
    """Oracle: closed form. L = mean (Xw − y)² has H = 2 X'X / N everywhere, and gradient descent the edge 2/η."""
    torch.manual_seed(0)
    x, y = torch.randn(20, 4) * torch.tensor([3.0, 1.0, 0.5, 0.1]), torch.randn(20, 1)
    model = nn.Linear(4, 1, bias=False)
    opt = torch.optim.SGD(model.parameters(), lr=0.02)
    gradients = []
    with monitor.attach(model, tmp_path / "run", curvature=Curvature(every=3, full=2, top=4)):
        for _ in range(7):
            opt.zero_grad()
            F.mse_loss(model(x), y).backward()
            gradients.append(model.weight.grad.double().flatten().numpy().copy())  # pyright: ignore
            opt.step()
    H = 2 * (x.double().T @ x.double() / 20).numpy()
    eigenvalues = np.linalg.eigvalsh(H)[::-1]
    run = monitor.open(tmp_path / "run")
    assert column(run, "sharpness.value") == pytest.approx([eigenvalues[0]] * 3, rel=1e-5)
    assert column(run, "sharpness.parameters") == [4] * 3
    assert column(run, "sharpness.examples") == [20] * 3
    assert column(run, "sharpness.loss") == pytest.approx(column(run, "loss.value")[::3], rel=1e-6)
    for i in range(4):
        found = column(run, "hessian_eigenvalue.value", f"eigenvalue[{i + 1}]")
        assert found == pytest.approx([eigenvalues[i]] * 2, rel=1e-4)
    assert column(run, "hessian_trace.trace") == pytest.approx([H.trace()] * 2, rel=1e-5)
    assert column(run, "hessian_trace.frobenius") == pytest.approx([np.linalg.norm(H)] * 2, rel=1e-5)
    assert column(run, "hessian_trace.samples") == [0, 0]
    assert column(run, "spectral_density.smallest") == pytest.approx([eigenvalues[-1]] * 2, rel=1e-3)
    assert column(run, "edge_of_stability.ratio") == pytest.approx([0.02 * eigenvalues[0] / 2] * 3, rel=1e-5)
    assert column(run, "edge_of_stability.threshold") == pytest.approx([100] * 3)
    assert column(run, "edge_of_stability.stable_lr") == pytest.approx([2 / eigenvalues[0]] * 3, rel=1e-5)
    assert column(run, "sgd_stability.ratio") == pytest.approx([0.01 * H.trace()] * 2, rel=1e-5)
    along = [g @ H @ g / (g @ g) for g in gradients[::3]]
    assert column(run, "batch_sharpness.value") == pytest.approx(along, rel=1e-4)
    assert column(run, "batch_sharpness.gradient_norm") == pytest.approx(
        [np.linalg.norm(g) for g in gradients[::3]], rel=1e-5
    )
    assert "preconditioned_sharpness.value" not in run.refs()
    assert [name for name, *_ in run.tables()] == ["spectral_density"] * 2
    table = run.table("spectral_density", 0).to_pydict()
    assert sum(table["weight"]) == pytest.approx(1)
    assert sorted(table["node"]) == pytest.approx(eigenvalues[::-1], rel=1e-3)


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_network_under_adam(dtype: torch.dtype | None, tmp_path: Path) -> None:
    """Oracle: dense float64 reference, and naive transcription for the preconditioner of Adam's own state."""
    trainings.seed()
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    opt = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.8, 0.95), weight_decay=0.1)
    wanted, blocks, conditioned = [], [], []
    curvature = Curvature(every=4, full=1, blocks=("0", "2"), dtype=dtype)
    with monitor.attach(model, tmp_path / "run", curvature=curvature):
        for step in range(9):
            x, y = torch.randn(16, 6), torch.randint(0, 3, (16,))
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            if step % 4 == 0:
                w = nn.utils.parameters_to_vector(model.parameters()).detach()

                def loss(v: Tensor, x: Tensor = x, y: Tensor = y) -> Tensor:
                    a, b, c, d = v.split([30, 5, 15, 3])
                    z = torch.tanh(x.double() @ a.view(5, 6).T + b) @ c.view(3, 5).T + d
                    return F.cross_entropy(z, y)

                H = dense(loss, w)
                wanted.append(H)
                blocks.append([np.linalg.eigvalsh(part)[-1] for part in (H[:35, :35], H[35:, 35:])])
                if step:
                    state = [opt.state[p] for p in model.parameters()]
                    v = torch.cat([s["exp_avg_sq"].flatten() for s in state]).double().numpy()
                    P = (1 - 0.8**step) * (np.sqrt(v / (1 - 0.95**step)) + 1e-8)
                    conditioned.append(np.linalg.eigvalsh(H / np.sqrt(P[:, None] * P))[-1])
            opt.step()
    run = monitor.open(tmp_path / "run")
    top = [np.linalg.eigvalsh(H)[::-1] for H in wanted]
    assert column(run, "sharpness.value") == pytest.approx([t[0] for t in top], rel=2e-4)
    assert column(run, "spectral_density.smallest") == pytest.approx([t[-1] for t in top], rel=2e-3)
    assert column(run, "hessian_trace.frobenius") == pytest.approx([np.linalg.norm(H) for H in wanted], rel=0.05)
    for i, name in enumerate(("0", "2")):
        assert column(run, "block_sharpness.value", name) == pytest.approx([b[i] for b in blocks], rel=2e-4)
    threshold = (2 + 2 * 0.8) / (1 - 0.8) / 0.01
    assert column(run, "preconditioned_sharpness.value") == pytest.approx(conditioned, rel=2e-3)
    assert column(run, "preconditioned_sharpness.threshold") == pytest.approx([threshold] * 2)
    assert column(run, "edge_of_stability.ratio") == pytest.approx([c / threshold for c in conditioned], rel=2e-3)


def test_landscape(tmp_path: Path) -> None:
    """Oracle: closed form. Along the eigenvectors of a quadratic, L(a, b) = L + a g_1 + b g_2 + (λ₁ a² + λ₂ b²) / 2."""
    torch.manual_seed(0)
    x, y = torch.randn(20, 4) * torch.tensor([3.0, 1.0, 0.5, 0.1]), torch.randn(20, 1)
    model = nn.Linear(4, 1)
    model.bias.requires_grad_(False)
    opt = torch.optim.SGD(model.parameters(), lr=0.02)
    values: list[float] = []
    slopes: list[np.ndarray] = []
    with monitor.attach(model, tmp_path / "run", curvature=Curvature(every=2, full=1, landscape=0.5)):
        for _ in range(3):
            opt.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            values.append(loss.item())
            slopes.append(model.weight.grad.double().flatten().numpy().copy())  # pyright: ignore
            opt.step()
    run = monitor.open(tmp_path / "run")
    assert [step for name, _, step in run.tables() if name == "landscape"] == [0, 2]
    table = run.table("landscape", 2).to_pydict()
    a, b, found = (np.array(table[c]).reshape(11, 11) for c in ("first", "second", "loss"))
    assert a[:, 0] == pytest.approx(np.linspace(-0.5, 0.5, 11)) == b[0]
    curvature, vectors = np.linalg.eigh(2 * (x.double().T @ x.double() / 20).numpy())
    one, two = vectors[:, -1] @ slopes[2], vectors[:, -2] @ slopes[2]
    one = math.copysign(one, found[-1, 5] - found[0, 5])  # an eigenvector's sign is arbitrary
    two = math.copysign(two, found[5, -1] - found[5, 0])
    expected = values[2] + a * one + b * two + (curvature[-1] * a**2 + curvature[-2] * b**2) / 2
    assert found == pytest.approx(expected, rel=1e-3)


def test_opposing_rows(tmp_path: Path) -> None:
    """Oracle: naive transcription. Every row's own gradient, by one backward each, along the dense top eigenvector."""
    torch.manual_seed(1)
    model = nn.Linear(4, 3, bias=False)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(12, 4), torch.randint(0, 3, (12,))
    y[5] = -100
    with monitor.attach(model, tmp_path / "run", curvature=Curvature(every=1, full=1)):
        w = model.weight.detach().flatten().clone()
        F.cross_entropy(model(x), y).backward()
        opt.step()
    H = dense(lambda v: F.cross_entropy(x.double() @ v.view(3, 4).T, y), w)
    u = np.linalg.eigh(H)[1][:, -1]
    p = {}
    for i in range(12):
        v = w.double().requires_grad_()
        loss = F.cross_entropy(x[i : i + 1].double() @ v.view(3, 4).T, y[i : i + 1], reduction="sum")
        p[i] = float(torch.autograd.grad(loss, v)[0].numpy() @ u)
    run = monitor.open(tmp_path / "run")
    table = run.table("opposing_signals", 0).to_pydict()
    assert 5 not in table["row"]
    sign = np.sign(p[table["row"][0]] * table["projection"][0])
    assert table["projection"] == pytest.approx([sign * p[i] for i in table["row"]], rel=1e-3, abs=1e-4)
    counted = np.array([p[i] for i in range(12) if i != 5])
    assert column(run, "opposing_signals.rows") == [11]
    assert column(run, "opposing_signals.typical") == pytest.approx([np.median(np.abs(counted))], rel=1e-3)
    cancelled = 1 - abs(counted.sum()) / np.abs(counted).sum()
    assert column(run, "opposing_signals.cancelled") == pytest.approx([cancelled], rel=1e-3)
