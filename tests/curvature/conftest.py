from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch scripts its forward-mode rules on first import
    import torch._decomp.decompositions_for_jvp


@dataclass
class Problem:
    """A model with data and, by torch.func in float64, the dense Hessian of its mean loss."""

    model: nn.Module
    loss_fn: Callable[..., Tensor]
    x: Tensor
    y: Tensor

    @property
    def batch(self) -> tuple[Tensor, Tensor]:
        return self.x, self.y

    def hessian(self) -> Tensor:
        named = {k: p.detach().double() for k, p in self.model.named_parameters() if p.requires_grad}
        rest = {k: p.detach().double() for k, p in self.model.named_parameters() if not p.requires_grad}
        rest |= {k: b.double() if b.is_floating_point() else b for k, b in self.model.named_buffers()}
        x = self.x.double() if self.x.is_floating_point() else self.x
        y = self.y.double() if self.y.is_floating_point() else self.y
        sizes = [p.numel() for p in named.values()]

        def loss(flat: Tensor) -> Tensor:
            pieces = zip(named.items(), flat.split(sizes), strict=True)
            return self.loss_fn(functional_call(self.model, rest | {k: v.view_as(p) for (k, p), v in pieces}, (x,)), y)

        return torch.func.hessian(loss)(torch.cat([p.reshape(-1) for p in named.values()]))


@pytest.fixture
def classifier() -> Problem:
    """Two tanh layers and cross-entropy: 79 parameters, an indefinite Hessian."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    return Problem(model, nn.functional.cross_entropy, torch.randn(24, 5), torch.randint(0, 3, (24,)))


@pytest.fixture
def regression() -> Problem:
    """One tanh layer and mean squared error: 35 parameters."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2, bias=False))
    return Problem(model, nn.functional.mse_loss, torch.randn(16, 4), torch.randn(16, 2))
