"""Names of examples by what is in them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from monitor.remedies import fingerprints


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.uint8, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(7,), (3, 40, 40), (1,)])
def test_wherever_an_example_stands(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Oracle: invariance. The name of an example is the same alone, in another order and in other memory."""
    x = (torch.randn(50, *shape, generator=torch.Generator().manual_seed(0)) * 20).to(dtype)
    names = fingerprints(x)
    assert (names.dtype, names.shape) == (torch.int64, (50,))
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(fingerprints(x[order]), names[order])
    assert torch.equal(torch.cat([fingerprints(x[i : i + 1]) for i in range(50)]), names)
    assert torch.equal(fingerprints(x.movedim(0, -1).contiguous().movedim(-1, 0)), names)


def test_by_hand() -> None:
    """Oracle: naive transcription. The sum of bits times weights, in Python's integers, modulo 2^64."""
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    weights = [int(w) * 2 + 1 for w in np.random.default_rng(1).integers(-(1 << 62), 1 << 62, 3, dtype=np.int64)]
    bits = x.numpy().view(np.int32).tolist()
    expected = [sum(b * w for b, w in zip(row, weights, strict=True)) % 2**64 for row in bits]
    assert [v % 2**64 for v in fingerprints(x).tolist()] == expected


def test_names_differ() -> None:
    """Oracle: closed form. 60,000 black and white pictures of 28 x 28, and one pixel changed: no two share a name."""
    g = torch.Generator().manual_seed(0)
    x = (torch.rand(60_000, 28, 28, generator=g) < 0.2).float()
    assert len(fingerprints(x).unique()) == 60_000
    one = x[:100].clone()
    one[:, 14, 14] = 1 - one[:, 14, 14]
    assert not (fingerprints(one) == fingerprints(x[:100])).any()


def test_padding_with_zeros() -> None:
    """Oracle: invariance. Tokens padded with 0 to another length are the same example."""
    x = torch.randint(1, 1000, (20, 30), generator=torch.Generator().manual_seed(0))
    assert torch.equal(fingerprints(torch.nn.functional.pad(x, (0, 17))), fingerprints(x))
