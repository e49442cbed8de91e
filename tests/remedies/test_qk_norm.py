"""Queries and keys normalised per head: the bound on the logits, and what it is a bound of."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from monitor.errors import UsageError
from monitor.remedies import QKNorm


def pair(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    q, k = (scale * torch.randn(*shape, dtype=torch.float64, generator=g) for _ in range(2))
    return q.to(dtype), k.to(dtype)


def logits(q: Tensor, k: Tensor) -> Tensor:
    return q.double() @ k.double().transpose(-1, -2) / math.sqrt(q.shape[-1])


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e4])
def test_logits_are_bounded(kind: str, scale: float) -> None:
    """Oracle: bound. By Cauchy-Schwarz |⟨q, k⟩|/√d ≤ √d · max|γq γk|, whatever the queries and keys; met by q = k."""
    norm = QKNorm(16, kind=kind)
    with torch.no_grad():
        norm.query_gain.copy_(torch.linspace(-2, 1.5, 16))  # pyright: ignore[reportOptionalMemberAccess]
    assert norm.bound() == 8.0
    q, k = pair(2, 4, 32, 16, scale=scale)
    assert logits(*norm(q, k)).abs().max().item() <= norm.bound() * (1 + 1e-6)
    plain = QKNorm(16, kind=kind, gain=False)
    assert plain.bound() == 4.0 and not list(plain.parameters())
    own = logits(*plain(q, q)).diagonal(dim1=-2, dim2=-1)
    assert own.max().item() == pytest.approx(4.0, rel=1e-2)  # eps takes a little at scale 1e-2


def test_three_four() -> None:
    """Oracle: closed form. (3, 4) has mean square 12.5; minus its mean it is (−.5, .5), whose mean square is .25."""
    x = torch.tensor([3.0, 4.0], dtype=torch.float64)
    rms, _ = QKNorm(2, eps=0)(x, x)
    layer, _ = QKNorm(2, kind="layer", eps=0)(x, x)
    torch.testing.assert_close(rms, x / math.sqrt(12.5))
    torch.testing.assert_close(layer, torch.tensor([-1.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_heads_do_not_mix_and_scale_does_not_matter(kind: str) -> None:
    """Oracle: invariance. Each head by itself; (batch, head, token, d) and (batch, token, head, d) give the same."""
    norm = QKNorm(8, kind=kind, eps=0)
    q, k = pair(2, 3, 5, 8)
    both = norm(q, k)
    for i in range(3):
        torch.testing.assert_close(norm(q[:, i], k[:, i]), (both[0][:, i], both[1][:, i]))
    torch.testing.assert_close(norm(q.transpose(1, 2), k)[0], both[0].transpose(1, 2))
    torch.testing.assert_close(norm(1000 * q, 0.001 * k), both)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_comes_back_and_large_values_do_not_overflow(dtype: torch.dtype) -> None:
    """Oracle: dense float64 reference. Values of 10,000, whose squares float16 cannot hold, within the dtype's eps."""
    q, k = pair(4, 6, 32, scale=5e3, dtype=dtype)
    found, _ = QKNorm(32)(q, k)
    x = q.double()
    assert found.dtype == dtype
    expected = x / x.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(found.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_learns() -> None:
    """Oracle: planted fault, absent. Both gains receive gradients and the module's state is those two vectors."""
    norm = QKNorm(8)
    q, k = pair(2, 5, 8, dtype=torch.float32)
    logits(*norm(q, k)).square().sum().backward()
    assert set(norm.state_dict()) == {"query_gain", "key_gain"}
    assert all(p.grad is not None and p.grad.abs().min() > 0 for p in norm.parameters())


def test_wrong_use_is_named() -> None:
    """Oracle: planted fault. Heads not split, and a kind that does not exist."""
    with pytest.raises(UsageError, match="expected head_dim = 8"):
        QKNorm(8)(*pair(2, 5, 32))
    with pytest.raises(UsageError, match="kind is 'l2'"):
        QKNorm(8, kind="l2")
