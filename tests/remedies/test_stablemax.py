"""StableMax: values, gradients, and agreement with PyTorch's cross-entropy on everything but the softmax."""

from __future__ import annotations

import math

import pytest
import torch

from monitor.remedies import StableMaxCrossEntropy, stablemax, stablemax_cross_entropy


def naive(z: list[float]) -> list[float]:
    """Definition 4 of the paper, in plain Python."""
    s = [x + 1 if x >= 0 else 1 / (1 - x) for x in z]
    return [x / sum(s) for x in s]


def logits_and_target() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    z = 5 * torch.randn(6, 7, dtype=torch.float64, generator=generator)
    return z, torch.randint(0, 7, (6,), generator=generator)


def test_one_confident_class() -> None:
    """Oracle: closed form. z = (10, 0 x 112): s = 11 and 112 ones, so p_y = 11/123; softmax would say 0.9949409."""
    z = torch.zeros(113, dtype=torch.float64)
    z[0] = 10
    assert stablemax(z)[0].item() == pytest.approx(11 / 123, rel=1e-14)
    assert torch.softmax(z, -1)[0].item() == pytest.approx(0.9949409, abs=5e-8)
    assert stablemax_cross_entropy(z, torch.tensor(0)).item() == pytest.approx(math.log(123 / 11), rel=1e-14)


def test_probabilities() -> None:
    """Oracle: naive transcription of the paper, on random logits with zeros and both signs."""
    z, _ = logits_and_target()
    z[0, :3] = 0
    for row in z:
        assert stablemax(row).tolist() == pytest.approx(naive(row.tolist()), rel=1e-13)


def test_probabilities_along_another_axis() -> None:
    """Oracle: invariance under transposition."""
    z, _ = logits_and_target()
    torch.testing.assert_close(stablemax(z.T, dim=0), stablemax(z).T)


def test_gradients() -> None:
    """Oracle: dense float64 reference, by finite differences, kinks at zero included."""
    z, target = logits_and_target()
    z[0, :3] = 0
    assert torch.autograd.gradcheck(lambda x: stablemax_cross_entropy(x, target), z.requires_grad_())


def test_gradient_of_zero_logits() -> None:
    """Oracle: closed form. s(0) = s'(0) = 1, so the gradient is p - onehot: a head initialised to zero can learn."""
    z = torch.zeros(1, 4, requires_grad=True)
    stablemax_cross_entropy(z, torch.tensor([1])).backward()
    assert z.grad is not None
    assert z.grad.tolist() == [[0.25, -0.75, 0.25, 0.25]]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_and_ignored_samples(reduction: str) -> None:
    """Oracle: naive transcription of the paper, over the samples that count."""
    z, target = logits_and_target()
    target[2] = 9
    each = [0.0 if y == 9 else -math.log(naive(row)[y]) for row, y in zip(z.tolist(), target.tolist(), strict=True)]
    expected = {"mean": sum(each) / 5, "sum": sum(each), "none": each}[reduction]
    loss = StableMaxCrossEntropy(ignore_index=9, reduction=reduction)(z, target)
    assert loss.tolist() == pytest.approx(expected, rel=1e-13)


def test_shapes_are_those_of_cross_entropy() -> None:
    """Oracle: invariance. (sample, class, position) is the same as its positions one after the other."""
    z, target = logits_and_target()
    deep = stablemax_cross_entropy(z.reshape(2, 3, 7).transpose(1, 2), target.reshape(2, 3))
    torch.testing.assert_close(deep, stablemax_cross_entropy(z, target))
    soft = torch.nn.functional.one_hot(target, 7).double()
    torch.testing.assert_close(stablemax_cross_entropy(z, soft), stablemax_cross_entropy(z, target))


def test_arithmetic_is_float64_unless_asked() -> None:
    """Oracle: closed form. A half-precision head keeps a loss of ln(1 + 1/60001), far below its own resolution."""
    z = torch.tensor([[60000.0, 0.0]], dtype=torch.float16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = stablemax_cross_entropy(z, torch.tensor([0]))
    exact = math.log1p(1 / (float(z[0, 0]) + 1))
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(exact, rel=1e-10)
    assert stablemax_cross_entropy(z, torch.tensor([0]), dtype=torch.float32).dtype == torch.float32


def test_confident_samples_still_teach() -> None:
    """Oracle: planted fault. A margin that makes the softmax loss 0 in float32 still gives a loss and a gradient."""
    z = torch.tensor([[40.0, 0.0]], requires_grad=True)
    softmax_loss = torch.nn.functional.cross_entropy(z, torch.tensor([0]))
    assert softmax_loss.item() == 0
    loss = stablemax_cross_entropy(z, torch.tensor([0]), dtype=torch.float32)
    loss.backward()
    assert z.grad is not None
    assert loss.item() == pytest.approx(math.log1p(1 / 41), rel=1e-5)
    assert z.grad[0, 0].item() == pytest.approx(-1 / (41 * 42), rel=1e-5)


def test_masked_classes() -> None:
    """Oracle: closed form. A logit of -inf has probability 0 and no gradient, and NaN stays NaN."""
    z = torch.tensor([[1.0, -math.inf, 0.0]], requires_grad=True)
    assert stablemax(z).tolist() == [pytest.approx([2 / 3, 0, 1 / 3])]
    stablemax_cross_entropy(z, torch.tensor([0])).backward()
    assert z.grad is not None
    assert z.grad.tolist() == [pytest.approx([-1 / 6, 0, 1 / 3])]
    assert stablemax(torch.tensor([math.nan, 0.0])).isnan().all()
