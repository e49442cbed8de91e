"""The fused reductions of parameters and inputs against closed forms and dense float64 references."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from monitor.record.passes import distance
from monitor.record.passes.input import fingerprints, input_stats
from monitor.record.passes.input import sizes as input_sizes
from monitor.record.passes.parameter import ParameterReader, on_device


def test_update_is_the_true_change() -> None:
    """Oracle: dense float64 reference. Small tensors, which are read side by side, and one that is read in pieces."""
    torch.manual_seed(0)
    now = [torch.randn(50, 40), torch.randn(9), torch.randn(101, 103).T, torch.randn(())]
    held = [w.clone(memory_format=torch.contiguous_format) for w in now]
    reader = ParameterReader(held, held)
    for _ in range(3):
        old = [w.double() for w in now]
        for w in now:
            w.add_(torch.randn_like(w) * 1e-3)
        got, aligned, moved = reader.read(now, [None] * 4, distances=False)
        assert aligned is None
        assert moved is None
        torch._foreach_copy_(held, now)
        for i, (a, b) in enumerate(zip(old, now, strict=True)):
            assert got[i, 0] == pytest.approx((b.double() - a).norm().item(), rel=1e-4)
            assert got[i, 1] == pytest.approx(b.double().norm().item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_parameters_on_the_accelerator_as_on_the_cpu(dtype: torch.dtype) -> None:
    """Oracle: independent computation. Buffers in torch, run on a CPU, against rows and pieces in numpy."""
    torch.manual_seed(0)
    now = [torch.randn(s).to(dtype) for s in ((), (70,), (300, 257), (1 << 13,), (9000,), (50,), (0,))]
    before, start = ([w + 0.1 * torch.randn_like(w) for w in now] for _ in range(2))
    grads = [torch.randn_like(w) if i % 3 else None for i, w in enumerate(now)]
    samples = [distance.sample(w.view(-1)) for w in start]
    found = ParameterReader(before, samples).read(now, grads, distances=True)
    reference = on_device(now, before, grads, samples)
    rough = 1e-2 if dtype == torch.bfloat16 else 1e-5  # there the change is rounded to the parameters' own dtype
    for a, b in zip(found, reference, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=rough, atol=1e-5)


def test_distance_of_small_tensors_is_exact() -> None:
    """Oracle: closed form. Every one of 1,000 elements moved by 0.5: squared distance 250, no variance."""
    p = torch.zeros(1000)
    start = distance.sample(p).clone()
    p += 0.5
    assert distance.distance_stats(distance.sample(p.numpy()), start.numpy(), 1000) == (250, 0, 1)
    moved = ParameterReader([p], [start]).read([p], [None], distances=True)[2]
    assert np.asarray(moved).tolist() == [[250, 0, 1]]


def test_distance_estimate_is_unbiased_and_knows_its_error() -> None:
    """Oracle: dense float64 reference. Mean error within 4 standard errors; stated error as scattered.

    60 draws fix a standard deviation to about 10 %, so 35 % is generous.
    """
    errors, stated = [], []
    for seed in range(60):
        g = torch.Generator().manual_seed(seed)
        start = np.zeros(400_000)
        now = torch.randn(400, 1000, generator=g) * torch.rand(400, 1, generator=g)
        moved = distance.sample(now.view(-1).numpy())
        sumsq, var, exact = distance.distance_stats(moved, distance.sample(start), now.numel())
        errors.append(sumsq - now.double().square().sum().item())
        stated.append(math.sqrt(var))
        assert exact == 0
    scatter = torch.tensor(errors).std().item()
    assert abs(sum(errors) / 60) < 4 * scatter / math.sqrt(60)
    assert sum(stated) / 60 == pytest.approx(scatter, rel=0.35)


def test_input_statistics_and_fingerprint() -> None:
    """Oracle: closed form, and invariance: equal batches have equal fingerprints, one changed element another."""
    x = torch.tensor([[3.0, -4.0], [0.0, 0.0]])
    n, sumsq, peak, bad, mark = input_stats(x)
    assert (n, sumsq, peak, bad) == (4, 25, 4, 0)
    assert input_stats(x.clone())[4] == mark
    assert input_stats(x.flip(1))[4] != mark
    assert mark == int(mark) < 2**24
    tokens = torch.arange(12).view(3, 4)
    assert len(input_stats(tokens)) == 1
    x[0, 0] = math.nan
    assert input_stats(x)[3] == 1
    assert math.isnan(input_stats(x)[2])


def test_inputs_on_an_accelerator() -> None:
    """Oracle: independent computation. All inputs at once, run on a CPU, against numpy: dtypes, views, NaN."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(41, 60, generator=g) * 100
    dtypes = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16)
    inputs = [x.to(d) for d in (*dtypes, torch.uint8, torch.bool)]
    inputs += [x.T, x[::2, 1:], x[0], x[0, 0], torch.randint(-9, 9, (3, 5, 7), generator=g), torch.randn(6, 3000)]
    assert fingerprints(inputs).tolist() == [input_stats(i)[-1] for i in inputs]
    assert fingerprints(inputs[:1]).tolist() == [input_stats(x)[-1]]
    x[3, 4], x[5, 6] = math.nan, -math.inf
    for i in (*inputs, x, x.T, x[5:], x[7:].bfloat16()):
        if i.is_floating_point():
            np.testing.assert_allclose(input_sizes(i).numpy(), input_stats(i)[1:4], rtol=1e-5)


def test_large_inputs_on_an_accelerator_are_counted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: planted fault. Five elements that are not finite are five, however many parts."""
    monkeypatch.setattr("monitor.record.passes.input._SCRATCH", 100)
    x = torch.zeros(50, 30)
    x[::10, 3] = math.nan
    assert input_sizes(x)[2] == 5
    assert input_sizes(x[0])[2] == 1
    assert input_sizes(x[1:2])[2] == 0
