"""The orthogonal gradient, as a function on gradients and inside optimizers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from monitor.errors import UsageError
from monitor.remedies import OrthogonalGradient, orthogonalize_gradients_


def tensor_with_gradient(w: Tensor, g: Tensor) -> nn.Parameter:
    p = nn.Parameter(w.clone())
    p.grad = g.clone()
    return p


def orthogonal(w: Tensor, g: Tensor, rescale: bool = True) -> Tensor:
    p = tensor_with_gradient(w, g)
    orthogonalize_gradients_([p], rescale=rescale)
    assert torch.equal(p.detach(), w)
    assert p.grad is not None
    return p.grad


def random_pair(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, dtype=dtype, generator=generator), torch.randn(*shape, dtype=dtype, generator=generator)


@pytest.mark.parametrize(("rescale", "expected"), [(False, [0.0, 4.0]), (True, [0.0, 5.0])])
def test_two_numbers(rescale: bool, expected: list[float]) -> None:
    """Oracle: closed form. W = (1, 0), g = (3, 4): the paper's equation gives (0, 4), the official code (0, 5)."""
    assert orthogonal(torch.tensor([1.0, 0.0]), torch.tensor([3.0, 4.0]), rescale).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("rescale", [False, True])
def test_matrix(rescale: bool) -> None:
    """Oracle: naive transcription of the paper's equation 12 and of the official rescaling, in float64."""
    w, g = random_pair(5, 4)
    part = g - (torch.dot(w.flatten(), g.flatten()) / torch.dot(w.flatten(), w.flatten())) * w
    expected = part * g.norm() / part.norm() if rescale else part
    torch.testing.assert_close(orthogonal(w, g, rescale), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_orthogonal_and_as_long_as_before(dtype: torch.dtype) -> None:
    """Oracle: invariance. The result has no component along the tensor and the gradient's norm, within the dtype."""
    w, g = random_pair(30, 20, dtype=dtype)
    result = orthogonal(w, g).double()
    w, g = w.double(), g.double()
    cosine = (w * result).sum() / (w.norm() * result.norm())
    assert abs(cosine.item()) < 4 * torch.finfo(dtype).eps
    assert (result.norm() / g.norm()).item() == pytest.approx(1, abs=4 * torch.finfo(dtype).eps)


def test_idempotent_and_blind_to_scale() -> None:
    """Oracle: invariance. Twice is once; the length of the tensor does not matter; the gradient's carries over."""
    w, g = random_pair(7, 3)
    once = orthogonal(w, g)
    torch.testing.assert_close(orthogonal(w, once), once)
    torch.testing.assert_close(orthogonal(100 * w, g), once)
    torch.testing.assert_close(orthogonal(w, -3 * g), -3 * once)


def test_tiny_gradients() -> None:
    """Oracle: invariance. Gradients of 1e-24, whose squares vanish in float32, are treated like large ones."""
    w, g = random_pair(50, dtype=torch.float32)
    assert torch.dot(g * 1e-24, g * 1e-24) == 0
    torch.testing.assert_close(orthogonal(w, g * 1e-24) * 1e24, orthogonal(w, g), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("elements", [1, 1000])
def test_parallel_gradient_is_not_turned_into_noise(elements: int) -> None:
    """Oracle: closed form. Nothing is left of a gradient along the tensor, and rounding is not blown up to its norm."""
    w, _ = random_pair(elements, dtype=torch.float32)
    assert orthogonal(w, 0.1 * w).abs().max().item() == 0


def test_zero_tensor_and_zero_gradient() -> None:
    """Oracle: closed form. Against a zero tensor nothing is removed; a zero gradient stays zero."""
    _, g = random_pair(4, 4)
    torch.testing.assert_close(orthogonal(torch.zeros(4, 4, dtype=torch.float64), g), g)
    assert orthogonal(g, torch.zeros_like(g)).abs().max().item() == 0


def test_gradients_left_alone_or_refused() -> None:
    """Oracle: planted fault. No gradient and no elements are skipped; sparse and complex gradients are named."""
    orthogonalize_gradients_([nn.Parameter(torch.ones(2)), tensor_with_gradient(torch.empty(0), torch.empty(0))])
    sparse = tensor_with_gradient(torch.ones(3, 2), torch.eye(3, 2).to_sparse())
    with pytest.raises(UsageError, match=r"sparse gradient of shape \(3, 2\)"):
        orthogonalize_gradients_([sparse])
    with pytest.raises(UsageError, match="complex gradient"):
        orthogonalize_gradients_([tensor_with_gradient(torch.ones(2) + 0j, torch.ones(2) + 0j)])


def test_optimizer_steps_along_it() -> None:
    """Oracle: closed form. SGD on W = (1, 0) with gradient (3, 4) and lr 0.1 gives (1, -0.5), without (0.7, -0.4)."""
    for remove, expected in ((False, [1.0, -0.5]), (True, [0.7, -0.4])):
        p = tensor_with_gradient(torch.tensor([1.0, 0.0]), torch.tensor([3.0, 4.0]))
        optimizer = torch.optim.SGD([p], lr=0.1)
        before = optimizer.state_dict()
        projected = OrthogonalGradient(optimizer)
        if remove:
            projected.remove()
        optimizer.step()
        assert p.tolist() == pytest.approx(expected)
        assert optimizer.state_dict() == before


def test_parameters_added_later() -> None:
    """Oracle: closed form. A parameter group added after the projection is projected too."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    OrthogonalGradient(optimizer, rescale=False)
    late = tensor_with_gradient(torch.tensor([1.0, 0.0]), torch.tensor([3.0, 4.0]))
    optimizer.add_param_group({"params": [late]})
    optimizer.step()
    assert late.tolist() == pytest.approx([1.0, -0.4])


@pytest.mark.parametrize("as_keyword", [False, True])
def test_closures(as_keyword: bool) -> None:
    """Oracle: closed form. The gradient that a closure computes inside the step is projected, and its loss returned."""
    p = nn.Parameter(torch.tensor([1.0, 0.0]))
    optimizer = torch.optim.SGD([p], lr=0.1)
    OrthogonalGradient(optimizer)

    def closure() -> float:
        optimizer.zero_grad()
        loss = (p * torch.tensor([3.0, 4.0])).sum()
        loss.backward()
        return loss.item()

    loss = optimizer.step(closure=closure) if as_keyword else optimizer.step(closure)
    assert loss == pytest.approx(3.0)
    assert p.tolist() == pytest.approx([1.0, -0.5])


def test_scaled_gradients() -> None:
    """Oracle: invariance. Under a GradScaler the step is the one without it: projection comes after unscaling."""
    ends = []
    for enabled in (False, True):
        p = nn.Parameter(torch.tensor([1.0, 0.0]))
        optimizer = torch.optim.SGD([p], lr=0.1)
        OrthogonalGradient(optimizer)
        scaler = torch.amp.GradScaler("cpu", enabled=enabled)
        scaler.scale((p * torch.tensor([3.0, 4.0])).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        ends.append(p.tolist())
    assert ends[0] == ends[1] == pytest.approx([1.0, -0.5])


def test_weights_grow_only_sideways() -> None:
    """Oracle: invariance. With plain SGD the squared norm of every tensor grows by exactly ‖Δw‖² in every step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    OrthogonalGradient(optimizer)
    x, y = torch.randn(16, 6).double(), torch.randint(0, 3, (16,))
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        for p, b in zip(model.parameters(), before, strict=True):
            assert (p * p).sum().item() == pytest.approx(((b * b).sum() + ((p - b) ** 2).sum()).item(), rel=1e-12)
