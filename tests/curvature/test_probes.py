from __future__ import annotations

import copy
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from monitor.curvature import (
    Hessian,
    LossClosure,
    alignment,
    barrier,
    batch_sharpness,
    diagonal,
    lanczos,
    landscape,
    loss_changes,
    opposing_signals,
    spectrum,
    trajectory_kl,
)
from monitor.errors import UsageError


def closure(problem, **options) -> LossClosure:
    return LossClosure(problem.model, problem.loss_fn, problem.batch, dtype=torch.float64, **options)


def test_batch_sharpness(classifier):
    """Oracle: dense reference (torch.func, float64), and the mean and standard error by hand."""
    batches = [(classifier.x[i : i + 8], classifier.y[i : i + 8]) for i in (0, 8, 16)]
    expected, x, y = [], classifier.x, classifier.y
    for batch in batches:
        classifier.x, classifier.y = batch
        H, g = classifier.hessian(), closure(classifier).gradient()
        expected.append(float(g @ H @ g / (g @ g)))
    classifier.x, classifier.y = x, y
    found = batch_sharpness(classifier.model, F.cross_entropy, batches)
    assert found.value == pytest.approx(np.mean(expected), rel=1e-4) and found.samples == 3
    assert found.stderr == pytest.approx(np.std(expected, ddof=1) / 3**0.5, rel=1e-3)


def test_projections_are_the_slopes_of_every_example(classifier):
    """Oracle: dense reference: each example's own gradient, by a loop, times the direction."""
    u = torch.randn(79, dtype=torch.float64)
    found = opposing_signals(closure(classifier), u, count=4)
    parameters = list(classifier.model.double().parameters())
    slopes = []
    for x, y in zip(classifier.x.double(), classifier.y, strict=True):
        grads = torch.autograd.grad(F.cross_entropy(classifier.model(x[None]), y[None]), parameters)
        slopes.append(float(torch.cat([g.reshape(-1) for g in grads]) @ u / u.norm()))
    np.testing.assert_allclose(found.projections, slopes, rtol=1e-9, atol=1e-14)
    order = np.argsort(slopes)
    assert found.down.tolist() == order[:4].tolist() and found.up.tolist() == order[::-1][:4].tolist()
    assert found.typical == pytest.approx(np.median(np.abs(slopes)))


def test_planted_opposing_groups_are_found_by_their_ids():
    """Oracle: planted fault: one loud feature on 16 of 256 examples, half of them with either of two labels."""
    torch.manual_seed(0)
    x, y = torch.randn(256, 20) * 0.5, torch.randint(0, 10, (256,))
    x[:16, 0] = 6.0
    y[:8], y[8:16] = 3, 5
    model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.15)
    for _ in range(300):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    c = LossClosure(model, F.cross_entropy, (x, y))
    u = spectrum(model, c, top=1, bottom=0, steps=0, samples=0).eigenvectors[0]
    found = opposing_signals(c, u, count=8)
    sides = {frozenset(found.up.tolist()), frozenset(found.down.tolist())}
    assert sides == {frozenset(range(8)), frozenset(range(8, 16))}
    assert np.abs(found.projections[:16]).min() > 3 * found.typical


def test_alignment(classifier):
    """Oracle: dense reference for every number; identical sources agree exactly."""
    model, (x, y) = classifier.model, classifier.batch
    parts = {"a": (x[:12], y[:12]), "b": (x[12:], y[12:]), "a again": (x[:12], y[:12])}
    sources = {k: LossClosure(model, F.cross_entropy, b, dtype=torch.float64) for k, b in parts.items()}
    found = alignment(sources, hessians=True, tol=1e-6)
    H, g = [], []
    for classifier.x, classifier.y in parts.values():
        H.append(classifier.hessian())
        g.append(closure(classifier).gradient())
    G, P = torch.stack(g), torch.stack([h @ v for h, v in zip(H, g, strict=True)])
    cosine = float(g[0] @ g[1] / g[0].norm() / g[1].norm())
    assert found.names == ("a", "b", "a again")
    np.testing.assert_allclose(found.gradient_cosine, [[1, cosine, 1], [cosine, 1, cosine], [1, cosine, 1]], rtol=1e-9)
    np.testing.assert_allclose(found.gradient_distance, (G - G.mean(0)).square().sum(1), rtol=1e-9)
    np.testing.assert_allclose(found.product_distance, (P - P.mean(0)).square().sum(1), rtol=1e-8)
    norm = float(torch.linalg.matrix_norm(H[0] - H[1], 2))
    assert found.hessian_distance is not None
    np.testing.assert_allclose(
        found.hessian_distance, [[0, norm, 0], [norm, 0, norm], [0, norm, 0]], rtol=1e-5, atol=1e-12
    )
    same = alignment({"a": sources["a"], "b": sources["a again"]}, diagonals=2)
    assert not same.gradient_distance.any() and same.hessian_distance is None
    assert same.diagonal_distance is not None and not same.diagonal_distance.any()
    estimates = torch.stack([diagonal(Hessian(c), samples=3, seed=5) for c in sources.values()])
    spread = (estimates - estimates.mean(0)).square().sum(1)
    exact = torch.stack([h.diagonal() for h in H])
    torch.testing.assert_close(estimates, exact, rtol=0, atol=1.0)
    noisy = alignment(sources, diagonals=3, seed=5).diagonal_distance
    assert noisy is not None and found.diagonal_distance is None
    np.testing.assert_allclose(noisy, spread, rtol=1e-9)


def test_doubled_inputs_quadruple_the_hessian():
    """Oracle: closed form (spec 5.10): at W = 0, X_b = 2 X_a gives H_b = 4 H_a, so ‖H_a − H_b‖ = 3 λ_max(X'X/N)/C."""
    torch.manual_seed(0)
    x, y = torch.randn(40, 4, dtype=torch.float64), torch.randint(0, 3, (40,))
    model = nn.Linear(4, 3, bias=False).double()
    nn.init.zeros_(model.weight)
    sources = {str(s): LossClosure(model, F.cross_entropy, (s * x, y)) for s in (1, 2)}
    found = alignment(sources, hessians=True, tol=1e-8)
    expected = 3 * float(torch.linalg.eigvalsh(x.T @ x / 40)[-1]) / 3
    assert found.hessian_distance is not None and found.hessian_distance[0, 1] == pytest.approx(expected, rel=1e-8)


def test_landscape_of_a_quadratic():
    """Oracle: closed form: ½ Σ λ (w + t)² on the axes; the model is where it was."""
    model = nn.Linear(3, 1, bias=False).double()
    curvature = torch.tensor([4.0, 1.0, 0.25], dtype=torch.float64)
    c = LossClosure(model, lambda: 0.5 * (curvature * model.weight**2).sum())
    w = model.weight.detach().clone()[0]
    axes = 5 * torch.eye(3)[:2]
    line = landscape(c, axes[:1], radius=2.0, points=5)
    t = np.linspace(-2, 2, 5)
    rest = 0.5 * (curvature[1:] * w[1:] ** 2).sum().item()
    np.testing.assert_allclose(line.losses, 0.5 * 4 * (w[0].item() + t) ** 2 + rest, rtol=1e-12)
    plane = landscape(c, axes, radius=2.0, points=3)
    assert plane.losses.shape == (3, 3) and plane.losses[1, 1] == pytest.approx(c.value())
    assert plane.losses[2, 0] == pytest.approx(
        0.5 * float(4 * (w[0] + 2) ** 2 + (w[1] - 2) ** 2 + 0.25 * w[2] ** 2), rel=1e-12
    )
    assert torch.equal(model.weight[0], w)


def test_landscape_along_eigenvectors(classifier):
    """Oracle: dense reference: L(t) = L + t g'u + t²λ/2 + O(t³) along unit eigenvectors, which are the plane's axes."""
    c = closure(classifier)
    H = Hessian(c)
    k = lanczos(H, 2, tol=1e-10)
    u = k.eigenvectors()
    slopes = (u @ c.gradient()).numpy()
    h = 1e-3
    for i in range(2):
        line = landscape(c, u[i : i + 1], radius=h, points=3)
        assert np.diff(line.losses, 2)[0] / h**2 == pytest.approx(k.largest.values[i], rel=1e-4)
        assert (line.losses[2] - line.losses[0]) / (2 * h) == pytest.approx(slopes[i], rel=1e-4, abs=1e-9)
    plane = landscape(c, u, radius=h, points=3).losses
    mixed = (plane[2, 2] - plane[2, 0] - plane[0, 2] + plane[0, 0]) / (4 * h * h)
    assert mixed == pytest.approx(0, abs=1e-4 * k.largest.values[0])  # u_1'Hu_2 = 0: the axes of the valley


def test_what_is_frozen_stays_where_it_is(classifier):
    """Oracle: definition: the model itself is moved, whose first layer is frozen."""
    classifier.model[0].requires_grad_(False)
    c = closure(classifier)
    u = torch.randn(c.point().n, dtype=torch.float64)
    line = landscape(c, u[None], radius=0.5, points=3)
    other, moved = copy.deepcopy(classifier.model), []
    for t in (-0.5, 0.5):
        nn.utils.vector_to_parameters(
            nn.utils.parameters_to_vector(classifier.model[2:].parameters()) + t * (u / u.norm()).float(),
            other[2:].parameters(),
        )
        moved.append(F.cross_entropy(other(classifier.x), classifier.y).item())
    assert line.losses[[0, 2]] == pytest.approx(moved, rel=1e-5)
    assert line.losses[0] != pytest.approx(line.losses[1], rel=1e-3)
    straight = barrier(c, other.state_dict())
    assert straight.losses[[0, -1]] == pytest.approx([line.losses[1], moved[1]], rel=1e-5)


def test_loss_changes():
    """Oracle: closed form (spec D8): Δ = [+5, −5, .1 × 98] gives share 10/19.8 = .50505 and split ½."""
    delta = np.r_[5.0, -5.0, np.full(98, 0.1)]
    start = np.full(100, 7.0)
    found = loss_changes([start, start + delta])
    assert found.share == pytest.approx(0.50505, abs=1e-5) and found.split == 0.5 and np.isnan(found.flip)
    assert found.up.tolist() == [0] and found.down.tolist() == [1]
    swung = loss_changes(np.stack([start, start + delta, start + delta * np.r_[0, 0, np.full(98, 2)]]))
    assert swung.flip == 1 and swung.up.tolist() == [1] and swung.share == pytest.approx(found.share)
    smooth = loss_changes(np.stack([start, start + delta, start + 2 * delta]))
    assert smooth.flip == 0 and smooth.split == 0.5
    alike = loss_changes([start, start + np.abs(delta)], quantile=0.1)
    assert alike.split == 0 and len(alike.up) == 10 and not len(alike.down)


def test_loss_changes_do_not_depend_on_scale_or_order():
    """Oracle: invariance; and a naive transcription of spec D8 over several steps."""
    r = np.random.default_rng(0)
    losses = r.random((6, 50)) + 1
    found, order = loss_changes(losses, quantile=0.1), r.permutation(50)
    moved = loss_changes(3 * losses[:, order] - 2, quantile=0.1)
    assert (moved.share, moved.split, moved.flip) == pytest.approx((found.share, found.split, found.flip))
    assert order[moved.up].tolist() == found.up.tolist() and order[moved.down].tolist() == found.down.tolist()
    shares, splits, flips = [], [], []
    for t in range(5):
        d = losses[t + 1] - losses[t]
        T = sorted(range(50), key=lambda i: -abs(d[i]))[:5]
        shares.append(sum(abs(d[i]) for i in T) / sum(abs(d)))
        up = sum(d[i] > 0 for i in T)
        splits.append(min(up, 5 - up) / 5)
        if t:
            flips += [(d[i] > 0) != (losses[t][i] > losses[t - 1][i]) for i in T]
    expected = (np.mean(shares), np.mean(splits), np.mean(flips))
    assert (found.share, found.split, found.flip) == pytest.approx(expected)


def test_trajectory_kl():
    """Oracle: closed form: logits (τ log p) against (τ log q) give KL(p‖q); independent library: F.kl_div."""
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    for tau in (1.0, 5.0):
        found = trajectory_kl(tau * p.log() + 3, tau * q.log(), temperature=tau)
        assert found == pytest.approx(0.5 * np.log(2) - 0.25 * np.log(2))
    a, b = torch.randn(2, 4, 6, 9)
    expected = F.kl_div((b / 5).log_softmax(-1), (a / 5).log_softmax(-1), log_target=True, reduction="none").sum(-1)
    assert trajectory_kl(a, b) == pytest.approx(float(expected.mean()), rel=1e-5)
    assert trajectory_kl(a, a) == 0


def test_barrier():
    """Oracle: closed form: a double well (w² − 1)² has a barrier of 1 between its minima; a convex loss has none."""
    model = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(-1.0)
    other = {"weight": torch.ones(1, 1), "unrelated": torch.ones(5)}
    well = barrier(LossClosure(model, lambda: ((model.weight**2 - 1) ** 2).sum()), other)
    assert well.height == pytest.approx(1.0) and well.losses[10] == pytest.approx(1.0) and len(well.alphas) == 21
    assert barrier(LossClosure(model, lambda: (model.weight**2).sum()), other).height == 0.0
    tilted = barrier(LossClosure(model, lambda: model.weight.sum() * 3), other)
    assert tilted.height == pytest.approx(0.0, abs=1e-15) and tilted.losses[-1] == pytest.approx(3.0)
    assert model.weight.item() == -1.0


def test_barrier_between_checkpoints(tmp_path):
    """Oracle: naive transcription: losses of models that are interpolated by hand; states, files, wrapped names."""
    torch.manual_seed(0)
    x, y = torch.randn(30, 4).double(), torch.randint(0, 3, (30,))
    models = [nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double() for _ in range(3)]
    here, a, b = (m.state_dict() for m in models)
    losses = []
    for alpha in np.linspace(0, 1, 5):
        mixed = {k: (1 - alpha) * a[k] + alpha * b[k] for k in a}
        losses.append(float(F.cross_entropy(torch.func.functional_call(models[0], mixed, (x,)), y)))
    line = np.linspace(losses[0], losses[-1], 5)
    torch.save(a, tmp_path / "a.pt")
    torch.save({f"module.{k}": v for k, v in b.items()}, tmp_path / "b.pt")
    before = {k: v.clone() for k, v in here.items()}
    closure = LossClosure(models[0], F.cross_entropy, (x, y))
    for first, other in [(a, b), (str(tmp_path / "a.pt"), tmp_path / "b.pt"), (models[1].state_dict(), b)]:
        found = barrier(closure, other, first=first, points=5)
        np.testing.assert_allclose(found.losses, losses, rtol=1e-12)
        assert found.height == pytest.approx(float((losses - line).max()))
    models[0].load_state_dict(a)
    np.testing.assert_allclose(barrier(closure, b, points=5).losses, losses, rtol=1e-12)
    models[0].load_state_dict(before)


def test_barrier_with_running_statistics(tmp_path):
    """Oracle: planted fault and naive transcription: other statistics are refused in evaluation, unused in training."""
    torch.manual_seed(0)
    x, y = torch.randn(30, 4).double(), torch.randint(0, 3, (30,))
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()
    other = {k: v + 0.1 * torch.randn_like(v) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    with pytest.raises(UsageError, match=r'other has another 1\.running_mean.*mode="train"'):
        barrier(LossClosure(model, F.cross_entropy, (x, y)), other)
    found = barrier(LossClosure(model, F.cross_entropy, (x, y), mode="train"), other, points=3)
    mixed = {k: (model.state_dict()[k] + other[k]) / 2 for k, _ in model.named_parameters()}
    assert found.losses[1] == pytest.approx(
        float(F.cross_entropy(torch.func.functional_call(model, mixed, (x,)), y)), rel=1e-9
    )
    assert barrier(LossClosure(model, F.cross_entropy, (x, y)), model.state_dict()).height == 0.0


def test_barrier_reads_no_code(tmp_path):
    """Oracle: planted fault: a file that would run something when unpickled is refused, one of something else named."""

    class Run:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "made"),))

    torch.save({"weight": Run()}, tmp_path / "bad.pt")
    torch.save({"epoch": 3, "model": {"weight": torch.ones(1, 1)}}, tmp_path / "nested.pt")
    closure = LossClosure(nn.Linear(1, 1, bias=False), F.mse_loss, (torch.ones(2, 1), torch.ones(2, 1)))
    with pytest.raises(UsageError, match=r"bad\.pt holds more than tensors, and code is not run"):
        barrier(closure, tmp_path / "bad.pt")
    assert not (tmp_path / "made").exists()
    with pytest.raises(UsageError, match=r"nested\.pt holds the keys epoch, model; expected a state_dict"):
        barrier(closure, tmp_path / "nested.pt")


def test_messages(classifier):
    """Oracle: planted fault."""
    c = closure(classifier)
    plain = LossClosure(classifier.model, lambda: classifier.loss_fn(classifier.model(classifier.x), classifier.y))
    for call, message in [
        (lambda: batch_sharpness(classifier.model, F.cross_entropy, [classifier.batch]), "expected at least 2"),
        (lambda: opposing_signals(plain, torch.ones(79)), "plain closure"),
        (lambda: opposing_signals(c, torch.ones(3)), r"direction has shape \(3,\)"),
        (lambda: alignment({"one": c}), "expected at least 2 to compare"),
        (lambda: landscape(c, torch.ones(3, 79)), "expected one or two of"),
        (lambda: landscape(c, torch.ones(1, 79), points=4), "odd number"),
        (lambda: loss_changes(np.ones(9)), r"losses have shape \(9,\)"),
        (lambda: loss_changes([[1.0, np.nan], [1, 2]]), "all finite"),
        (lambda: loss_changes(np.ones((2, 9))), "changed the loss of no example"),
        (lambda: trajectory_kl(torch.ones(3, 4), torch.ones(3, 5)), "expected equal"),
        (lambda: barrier(c, {"0.bias": torch.ones(6)}), r"other has nothing for parameter 0\.weight.*\(and 4 more"),
        (lambda: barrier(c, {k: v[:2] for k, v in classifier.model.state_dict().items()}), r"has shape \(2, 5\) for"),
        (lambda: barrier(c, {}), "expected a state_dict"),
        (lambda: barrier(c, classifier.model.state_dict(), points=2), "at least 3"),
    ]:
        with pytest.raises(UsageError, match=message):
            call()
