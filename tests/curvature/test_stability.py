from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from monitor.curvature import (
    Hessian,
    LossClosure,
    averaged_gradient,
    batch_eigenvalue,
    batch_learning_rate,
    heavy_ball,
    nesterov,
    stability,
    update_rule,
)
from monitor.errors import UsageError


def largest_stable(step) -> float:
    """The largest η·λ at which every eigenvalue of the update's companion matrix is inside the unit circle."""
    low, high = 0.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        stable = np.abs(np.linalg.eigvals(np.array(step(middle)))).max() <= 1 + 1e-12
        low, high = (middle, high) if stable else (low, middle)
    return low


@pytest.mark.parametrize("b", [0.0, 0.5, 0.9, 0.99])
def test_thresholds_are_those_of_the_companion_matrix(b):
    """Oracle: closed form of another kind (spectral radius of the linear recursion); state (θ, buffer)."""
    assert heavy_ball(b) == pytest.approx(largest_stable(lambda a: [[1 - a, -b], [a, b]]), rel=1e-6)
    damped = largest_stable(lambda a: [[1 - 0.3 * a, -b], [0.3 * a, b]])
    assert heavy_ball(b, 0.7) == pytest.approx(damped, rel=1e-6)
    lookahead = largest_stable(lambda a: [[1 - (1 + b) * a, -b * b], [a, b]])  # torch adds β·buffer to the gradient
    assert nesterov(b) == pytest.approx(lookahead, rel=1e-6)
    mean = largest_stable(lambda a: [[1 - (1 - b) * a, -b], [(1 - b) * a, b]])
    assert averaged_gradient(b) == pytest.approx(mean, rel=1e-6)
    assert heavy_ball(0.9) == pytest.approx(3.8) and averaged_gradient(0.9) == pytest.approx(38)


OPTIMIZERS = {
    "gd": lambda p, lr: torch.optim.SGD(p, lr=lr),
    "heavy ball": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
    "dampened": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, dampening=0.5),
    "nesterov": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, nesterov=True),
}


class Quadratic(nn.Module):
    def __init__(self, curvature):
        super().__init__()
        self.curvature = torch.as_tensor(curvature, dtype=torch.float64)
        self.w = nn.Parameter(torch.ones(len(self.curvature), dtype=torch.float64))

    def forward(self):
        return 0.5 * (self.curvature * self.w**2).sum()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("factor", [0.98, 1.02])
def test_the_edge_is_where_a_real_optimizer_diverges(name, factor):
    """Oracle: closed form: on a quadratic the real optimizer converges just below ratio 1 and diverges just above."""
    model = Quadratic([3.0, 1.0, 0.2])
    H = Hessian(LossClosure(model, model))
    unit = stability(H, OPTIMIZERS[name](model.parameters(), 1.0))
    lr = factor * unit.largest_learning_rate
    optimizer = OPTIMIZERS[name](model.parameters(), lr)
    found = stability(H, optimizer)
    assert found.ratio == pytest.approx(factor) and found.sharpness == pytest.approx(3.0) and found.converged
    for _ in range(1500):
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
    assert (model.w.abs().max() > 10) == (factor > 1)


def test_adam_reads_its_real_preconditioner():
    """Oracle: closed form (spec 5.3): P-scaled eigenvalue from v, t, ε by hand, threshold 38 / η."""
    model = Quadratic([4.0, 1.0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
    state = optimizer.state[model.w]
    P = (1 - 0.9**5) * ((state["exp_avg_sq"] / (1 - 0.99**5)).sqrt() + 1e-3)
    found = stability(Hessian(LossClosure(model, model)), optimizer)
    expected = float((torch.tensor([4.0, 1.0]) / P).max())
    assert found.sharpness == pytest.approx(expected, rel=1e-6)
    assert found.threshold == pytest.approx(38 / 1e-3) and found.ratio == pytest.approx(expected * 1e-3 / 38, rel=1e-6)
    assert found.products > 0 and found.sgd_ratio is None


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_adam_with_a_frozen_preconditioner_diverges_at_the_edge(factor):
    """Oracle: closed form; β₂ → 1 with v started at 1 makes P constant, so that the linear theory is exact."""
    model = Quadratic([2.0, 0.5])
    optimizer = torch.optim.Adam(model.parameters(), lr=factor * 38 / 2.0, betas=(0.9, 1 - 1e-14), eps=0.0)
    v, t = torch.full((2,), 1e-10, dtype=torch.float64), 10_000
    optimizer.state[model.w] = {
        "step": torch.tensor(float(t)),
        "exp_avg": torch.zeros(2, dtype=torch.float64),
        "exp_avg_sq": v.clone(),
    }
    optimizer.param_groups[0]["lr"] *= float((v[0] / (1 - (1 - 1e-14) ** t)).sqrt())  # P in the units of the threshold
    found = stability(Hessian(LossClosure(model, model)), optimizer)
    assert found.ratio == pytest.approx(factor, rel=1e-3)
    with torch.no_grad():
        model.w.mul_(1e-20)  # small, so that v stays what it is
    for _ in range(600):
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
    assert (model.w.abs().max() > 1e-18) == (factor > 1)


@pytest.mark.parametrize("centered", [False, True])
def test_rmsprop_and_amsgrad(centered):
    """Oracle: closed form from the optimizer's state."""
    model = Quadratic([4.0, 1.0])
    H = Hessian(LossClosure(model, model))
    rms = torch.optim.RMSprop(model.parameters(), lr=1e-3, momentum=0.5, centered=centered)
    ams = torch.optim.Adam(model.parameters(), lr=1e-3, amsgrad=True)
    for optimizer in (rms, ams):
        for _ in range(3):
            optimizer.zero_grad()
            model().backward()
            optimizer.step()
    H = Hessian(LossClosure(model, model))
    s = rms.state[model.w]
    v = s["square_avg"] - s["grad_avg"] ** 2 if centered else s["square_avg"]
    rule = update_rule(rms, H)
    torch.testing.assert_close(rule.scale, 1e-3 / 3.0 / (v.sqrt() + 1e-8))
    s = ams.state[model.w]
    P = (1 - 0.9**3) * ((s["max_exp_avg_sq"] / (1 - 0.999**3)).sqrt() + 1e-8)
    torch.testing.assert_close(update_rule(ams, H).preconditioner, P)


def test_groups_of_different_learning_rate(classifier):
    """Oracle: dense reference: λ_max of the Hessian scaled by each parameter's own η/c; unlisted ones do not move."""
    model = classifier.model
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[2].parameters(), "lr": 0.01, "momentum": 0.9}],
        lr=1.0,
    )
    H = Hessian(LossClosure(model, classifier.loss_fn, classifier.batch, dtype=torch.float64))
    scale = torch.cat([torch.full((36,), 0.5 / 2), torch.full((28,), 0.01 / 3.8), torch.zeros(15)]).double()
    expected = torch.linalg.eigvalsh(scale.sqrt()[:, None] * classifier.hessian() * scale.sqrt())[-1]
    found = stability(H, optimizer, tol=1e-8)
    assert found.ratio == pytest.approx(float(expected), rel=1e-6)
    assert found.learning_rate is None is found.sharpness
    two = [
        torch.optim.SGD(model[0].parameters(), lr=0.5),
        torch.optim.SGD(model[2].parameters(), lr=0.01, momentum=0.9),
    ]
    assert stability(H, two, tol=1e-8).ratio == pytest.approx(float(expected), rel=1e-6)


def test_one_sample_sgd():
    """Oracle: closed form (spec 5.4): a_i = e_i, n = 10: tr = 1, so SGD is stable to η = 2 where GD is to η = 20."""
    model = Quadratic(np.full(10, 0.1))
    H = Hessian(LossClosure(model, model))
    for eta in (1.9, 2.1):
        found = stability(H, torch.optim.SGD(model.parameters(), lr=eta), trace=1.0)
        assert found.sgd_ratio == pytest.approx(eta / 2) and found.ratio == pytest.approx(eta / 20)
        w, r = np.ones(10), np.random.default_rng(0)
        for _ in range(2000):
            w[r.integers(10)] *= 1 - eta
        assert (np.abs(w).max() > 1) == (eta > 2)


def test_batch_law():
    """Oracle: closed form (spec 5.6): P 1000, √(P/b)·s = 5: a spike of 10 becomes 12.5, one of 3 drowns at 10."""
    for batch, examples in ((64, None), (64, 256), (256, 1024)):
        b = batch / (1 - batch / examples) if examples else batch
        noise = 5 * b**0.5
        assert batch_eigenvalue(10, noise, batch, examples) == pytest.approx(12.5)
        assert batch_eigenvalue(3, noise, batch, examples) == pytest.approx(10)
        assert batch_eigenvalue(5, noise, batch, examples) == pytest.approx(10)  # continuous where the spike drowns
    assert batch_eigenvalue(3, 80, 256, 256) == 3  # everything
    assert batch_learning_rate(0.1, 32, 128, adaptive=False) == pytest.approx(0.4)
    assert batch_learning_rate(0.1, 32, 128, adaptive=True) == pytest.approx(0.2)
    for batch, examples, noise in ((0, None, 1), (9, 8, 1), (1, None, -1)):
        with pytest.raises(UsageError, match="1 <= batch <= examples"):
            batch_eigenvalue(1, noise, batch, examples)


def test_batch_law_against_random_matrices():
    """Oracle: dense reference: a rank-one spike in a batch's mean of random symmetric matrices; mean over draws."""
    r, P, batch, draws = np.random.default_rng(0), 300, 9, 8
    u = np.ones(P) / P**0.5
    for spike in (12.0, 3.0):
        found = []
        for _ in range(draws):
            E = r.standard_normal((P, P)) / batch**0.5  # the mean of a batch of such matrices
            found.append(np.linalg.eigvalsh(spike * np.outer(u, u) + np.triu(E) + np.triu(E, 1).T)[-1])
        assert np.mean(found) == pytest.approx(batch_eigenvalue(spike, P**0.5, batch), rel=0.03)


def test_messages(classifier):
    """Oracle: planted fault."""
    H = Hessian(LossClosure(classifier.model, classifier.loss_fn, classifier.batch))
    parameters = list(classifier.model.parameters())
    for optimizer, message in [
        (torch.optim.Adam(parameters), "holds no state"),
        (torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=1.0), "does not update"),
        (torch.optim.Adagrad(parameters), "Adagrad is not one whose stability is known"),
        (torch.optim.SGD(parameters, lr=1.0, maximize=True), "maximizes"),
    ]:
        with pytest.raises(UsageError, match=message):
            stability(H, optimizer)
