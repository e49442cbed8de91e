from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from monitor.curvature import GaussNewton, Hessian, LossClosure
from monitor.curvature.kernels import twice_differentiable_kernels


def derivatives(layer: nn.Module, x: Tensor, train: bool = False) -> list[Tensor]:
    """Outputs, gradient, and the product of the second derivative with random vectors, by torch's double backward."""
    layer.train(train)
    at = [x.clone().requires_grad_(), *layer.parameters()]
    y = layer(at[0])
    g = torch.Generator().manual_seed(1)
    slopes = torch.autograd.grad(y.tanh().sum(), at, create_graph=True)
    vectors = [torch.randn(t.shape, generator=g, dtype=t.dtype) for t in slopes]
    return [y.detach(), *(t.detach() for t in slopes), *torch.autograd.grad(slopes, at, vectors)]


CONVOLUTIONS: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"stride": 2, "padding": 1},
    {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
    {"groups": 2},
    {"groups": 4, "out_channels": 8},
    {"kernel_size": (1, 3)},
    {"padding": "same"},
    {"padding": 1, "padding_mode": "circular"},
]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_convolutions_have_the_same_derivatives(options: dict[str, Any]) -> None:
    """Oracle: independent library: torch's own first and second derivatives, float64."""
    torch.manual_seed(0)
    given: Any = {"in_channels": 4, "out_channels": 6, "kernel_size": 3} | options
    layer = nn.Conv2d(**given).double()
    x = torch.randn(3, 4, 6, 7, dtype=torch.float64).mT  # not contiguous
    expected = derivatives(layer, x)
    with twice_differentiable_kernels():
        found = derivatives(layer, x)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_batch_norms_have_the_same_derivatives(kind: type[nn.Module], affine: bool, train: bool) -> None:
    """Oracle: independent library: torch's own first and second derivatives, float64."""
    torch.manual_seed(0)
    layer = kind(4, affine=affine, momentum=None).double()
    x = torch.randn(5, 4, *([3, 2] if kind is nn.BatchNorm2d else []), dtype=torch.float64) * 2 + 1
    layer(x)  # running statistics that differ from those of a new layer
    expected = derivatives(layer, x, train)
    with twice_differentiable_kernels():
        found = derivatives(layer, x, train)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelus_have_the_same_derivatives(approximate: str) -> None:
    """Oracle: independent library: torch's own first and second derivatives, float64."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(4, 6), nn.GELU(approximate), nn.Linear(6, 5), nn.GELU(approximate)).double()
    x = 3 * torch.randn(2, 5, 4, dtype=torch.float64).mT.reshape(-1, 4)
    expected = derivatives(layer, x)
    with twice_differentiable_kernels():
        found = derivatives(layer, x)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


class Mixed(nn.Module):
    """A convolution of what autocast has rounded, or of 16 bits with a batch norm of 32."""

    def __init__(self, autocast: bool) -> None:
        super().__init__()
        self.autocast, narrow = autocast, None if autocast else torch.bfloat16
        self.first = nn.Linear(6, 6, dtype=narrow)
        self.second, self.norm = nn.Conv2d(4, 4, 3, dtype=narrow), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return self.norm(self.second(self.first(x if self.autocast else x.bfloat16())))


@pytest.mark.parametrize("autocast", [True, False])
def test_mixed_precision_is_left_to_torch(autocast: bool) -> None:
    """Oracle: invariance. The same bits and dtypes as outside: which precision is used where is torch's to say."""
    torch.manual_seed(0)
    layer, x = Mixed(autocast), torch.randn(3, 4, 7, 6)
    expected = derivatives(layer, x)
    with twice_differentiable_kernels():
        found = derivatives(layer, x)
    assert expected[0].dtype == torch.bfloat16
    assert [t.dtype for t in found] == [t.dtype for t in expected]
    if autocast:
        assert all(map(torch.equal, found, expected))
    else:  # the convolution is ours
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0.1, atol=0.1)


class Convolutional(nn.Module):
    """Convolutions of which the first is frozen, normalised, and checkpointed if asked."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.norm, self.out = nn.BatchNorm2d(4), nn.Linear(4, 3)
        self.first.requires_grad_(False)
        self.checkpointed = checkpointed

    def _inner(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.second(self.first(x))))

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(self._inner, x, use_reentrant=False) if self.checkpointed else self._inner(x)
        assert isinstance(h, Tensor)
        return self.out(F.gelu(h.mean((2, 3))))


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("way", ["cached", "recompute"])
def test_hessians_of_convolutional_networks(way: Any, checkpointed: bool) -> None:
    """Oracle: dense reference (torch.func, float64, by torch's own kernels)."""
    torch.manual_seed(0)
    model, x, y = Convolutional(checkpointed), torch.randn(5, 1, 6, 6), torch.randint(0, 3, (5,))
    model(x)
    model.eval()
    closure = LossClosure(model, F.cross_entropy, (x, y), dtype=torch.float64)
    H = Hessian(closure, way=way)
    found = H.dense()
    assert H.way == way

    model = model.double()
    model.checkpointed = False
    named = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
    sizes = [p.numel() for p in named.values()]

    def loss(flat: Tensor) -> Tensor:
        parts = zip(named.items(), flat.split(sizes), strict=True)
        values = {k: v.view_as(p) for (k, p), v in parts}
        return F.cross_entropy(torch.func.functional_call(model, values, (x.double(),)), y)

    flat = torch.cat([p.reshape(-1) for p in named.values()])
    torch.testing.assert_close(found, torch.func.hessian(loss)(flat), rtol=1e-9, atol=1e-12)
    G = GaussNewton(closure).dense()
    torch.testing.assert_close(G, G.T, rtol=1e-9, atol=1e-12)


def test_the_forward_way_keeps_to_torch() -> None:
    """Oracle: invariance. Forward-over-reverse, which has no rule for our kernels, gives the same product."""
    torch.manual_seed(0)
    model, x, y = Convolutional(False), torch.randn(5, 1, 6, 6), torch.randint(0, 3, (5,))
    closure = LossClosure(model, F.cross_entropy, (x, y), dtype=torch.float64)
    v = torch.randn(Hessian(closure).n, dtype=torch.float64)
    torch.testing.assert_close(Hessian(closure, way="forward")(v), Hessian(closure)(v), rtol=1e-9, atol=1e-12)


def test_a_loss_that_uses_functorch_is_left_to_torch() -> None:
    """Oracle: dense reference. Per-example losses by vmap over a convolution."""
    torch.manual_seed(0)
    model = nn.Conv2d(1, 2, 3).double()
    x = torch.randn(4, 1, 5, 5, dtype=torch.float64)

    def loss() -> Tensor:
        return torch.func.vmap(lambda one: model(one[None]).square().mean())(x).mean()

    v = torch.randn(20, dtype=torch.float64)
    whole = Hessian(LossClosure(model, lambda: model(x).square().mean()))(v)
    torch.testing.assert_close(Hessian(LossClosure(model, loss))(v), whole)
