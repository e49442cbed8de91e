from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from monitor.curvature import LossClosure, jacobian, singular_values
from monitor.errors import UsageError


def closure(problem, **options) -> LossClosure:
    return LossClosure(problem.model, problem.loss_fn, problem.batch, dtype=torch.float64, **options)


def test_known_singular_values():
    """Oracle: closed form (spec R1): σ (4, 2, 1, 1): effective rank 3.363586, κ = 16; a fifth of zero is none."""
    Q = torch.linalg.qr(torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    matrix = Q * torch.tensor([4.0, 2, 1, 1, 0], dtype=torch.float64)
    for given_as in (matrix, matrix.T):
        found = singular_values(given_as)
        np.testing.assert_allclose(found.values, [4, 2, 1, 1, 0], atol=1e-7)
        assert found.rank == 4 and found.effective_rank == pytest.approx(3.363586, abs=1e-6)
        assert found.condition == pytest.approx(16) and "rank 4" in repr(found)
    nothing = singular_values(torch.zeros(3, 4))
    assert nothing.rank == 0 and np.isnan(nothing.condition) and np.isnan(nothing.effective_rank)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 1000))
def test_singular_values_of_any_matrix(rows, columns, seed):
    """Oracle: independent library (numpy's SVD), for tall, wide and rank-deficient matrices in float32."""
    generator = torch.Generator().manual_seed(seed)
    inner = 1 + seed % min(rows, columns)
    matrix = torch.randn(rows, inner, generator=generator) @ torch.randn(inner, columns, generator=generator)
    found = singular_values(matrix)
    expected = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(found.values, expected, atol=1e-6 * expected[0])
    # rounding of the float32 product must not count as rank; a true value may be that small only by rare chance
    assert found.rank <= inner


def test_rows_are_the_gradients_of_the_examples(classifier):
    """Oracle: dense reference: each example's own gradient, by a loop over a model that sees it alone."""
    found = jacobian(closure(classifier))
    parameters = list(classifier.model.double().parameters())
    rows = []
    for x, y in zip(classifier.x.double(), classifier.y, strict=True):
        grads = torch.autograd.grad(F.cross_entropy(classifier.model(x[None]), y[None]), parameters)
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
    torch.testing.assert_close(found.rows, torch.stack(rows), rtol=1e-9, atol=1e-14)
    expected = torch.linalg.svdvals(torch.stack(rows)).numpy()
    np.testing.assert_allclose(found.singular.values, expected, atol=1e-7 * expected[0])
    U, s = found.left, found.singular.values
    np.testing.assert_allclose((U * s**2) @ U.T, (found.rows @ found.rows.T).numpy(), atol=1e-12)


def test_output_rows_and_a_selection(regression):
    """Oracle: independent library (torch.func.jacrev); a selection keeps its columns."""
    c = closure(regression)
    found = jacobian(c, of="outputs")
    model = regression.model.double()
    named = dict(model.named_parameters())
    dense = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (regression.x.double(),)))(named)
    expected = torch.cat([dense[k].reshape(32, -1) for k in named], 1)
    torch.testing.assert_close(found.rows, expected, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(jacobian(c, "2", of="outputs").rows, expected[:, -10:], rtol=1e-9, atol=1e-14)


def test_one_step_of_least_squares_takes_the_residuals_to_zero():
    """Oracle: closed form (spec 5.13); a truncated step removes the part of the residuals that its directions span."""
    torch.manual_seed(0)
    x, y = torch.randn(6, 9, dtype=torch.float64), torch.randn(6, 1, dtype=torch.float64)
    model = nn.Linear(9, 1, bias=False).double()
    J = jacobian(LossClosure(model, F.mse_loss, (x, y)), of="outputs")
    assert J.singular.rank == 6
    r = (model(x) - y).detach()[:, 0]
    for rank in (None, 2, 99):
        after = r + x @ J.step(r, rank)
        left = torch.from_numpy(J.left[:, :2].copy())
        expected = r - left @ (left.T @ r) if rank == 2 else torch.zeros(6).double()
        torch.testing.assert_close(after, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(J.step(r), -(torch.linalg.pinv(x) @ r), rtol=1e-8, atol=1e-10)


def test_more_examples_than_weights_give_the_least_squares_solution():
    """Oracle: independent library (torch.linalg.lstsq)."""
    torch.manual_seed(1)
    x, y = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, 1, dtype=torch.float64)
    model = nn.Linear(3, 1, bias=False).double()
    J = jacobian(LossClosure(model, F.mse_loss, (x, y)), of="outputs")
    step = J.step((model(x) - y).detach()[:, 0])
    expected = torch.linalg.lstsq(x, y).solution[:, 0] - model.weight.detach()[0]
    torch.testing.assert_close(step, expected, rtol=1e-8, atol=1e-10)
    assert J.left.shape == (20, 3) and J.singular.rank == 3 and "20 × 3" in repr(J)


def test_messages(classifier):
    """Oracle: planted fault."""
    c = closure(classifier)
    plain = LossClosure(classifier.model, lambda: classifier.loss_fn(classifier.model(classifier.x), classifier.y))
    for call, message in [
        (lambda: jacobian(plain), "plain closure hides"),
        (lambda: jacobian(c, of="logits"), 'expected "losses" or "outputs"'),  # type: ignore[arg-type]
        (lambda: jacobian(c).step(torch.ones(3)), r"residuals have shape \(3,\)"),
        (lambda: singular_values(torch.ones(3)), r"shape \(3,\)"),
        (lambda: singular_values(torch.full((2, 3), float("nan"))), "not finite"),
    ]:
        with pytest.raises(UsageError, match=message):
            call()
