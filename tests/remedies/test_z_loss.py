"""The z-loss, as a number and as something to train with."""

from __future__ import annotations

import math

import pytest
import torch

from monitor.remedies import z_loss


def test_log_normalisers_from_one_to_ten() -> None:
    """Oracle: closed form. Logits (a, a) have lse a + ln 2; with lse = 1 … 10 the mean of the squares is 38.5."""
    lse = torch.arange(1, 11, dtype=torch.float64)
    logits = (lse - math.log(2)).unsqueeze(1).expand(10, 2)
    assert z_loss(logits, coefficient=1).item() == pytest.approx(38.5, rel=1e-14)
    assert z_loss(logits).item() == pytest.approx(38.5e-4, rel=1e-14)


def test_zero_logits_of_a_large_vocabulary() -> None:
    """Oracle: closed form. K = 50,257 zero logits: (ln K)² = 117.17857."""
    assert z_loss(torch.zeros(3, 50257), coefficient=1).item() == pytest.approx(117.17857, rel=1e-6)


def test_rows_that_do_not_count_and_the_axis() -> None:
    """Oracle: invariance. Padding changes neither value nor gradient; classes may stand on any axis."""
    z = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    valid = torch.tensor([True, True, False, True, False, True])
    kept = z_loss(z[valid])
    assert z_loss(z, valid=valid).item() == pytest.approx(kept.item(), rel=1e-14)
    torch.testing.assert_close(torch.autograd.grad(z_loss(z, valid=valid), z), torch.autograd.grad(kept, z))
    assert z_loss(z.T, dim=0).item() == pytest.approx(z_loss(z).item(), rel=1e-14)


def test_gradient() -> None:
    """Oracle: closed form. The gradient is 2 · coefficient · lse · softmax(z) / rows."""
    z = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    (found,) = torch.autograd.grad(z_loss(z, coefficient=0.3), z)
    torch.testing.assert_close(found, 2 * 0.3 * z.logsumexp(1, keepdim=True) * z.softmax(1) / 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_logits_in_low_precision(dtype: torch.dtype) -> None:
    """Oracle: closed form. One logit of 1,024 and one left out: lse² = 2^20, which float16 cannot hold."""
    value = z_loss(torch.tensor([[1024.0, -math.inf]], dtype=dtype), coefficient=1)
    assert (value.item(), value.dtype) == (2.0**20, torch.float32)


def test_it_pulls_back_what_cross_entropy_cannot_feel() -> None:
    """Oracle: closed form. Logits shifted by 10 stay there under cross-entropy; with z-loss ln Z goes to 0."""

    def trained(coefficient: float) -> torch.Tensor:
        z = torch.full((1, 3), 10.0, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([z], lr=0.5)
        for _ in range(200):
            optimizer.zero_grad()
            (torch.nn.functional.cross_entropy(z, torch.tensor([1])) + z_loss(z, coefficient=coefficient)).backward()
            optimizer.step()
        return z.detach()

    assert trained(0).sum().item() == pytest.approx(30, rel=1e-12)
    assert abs(trained(0.1).logsumexp(1).item()) < 0.5
