"""The fused reductions of gradients against closed forms and dense float64 references."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from monitor.block import ABSENT, ABSENT_BITS
from monitor.record.passes import side_by_side
from monitor.record.passes.gradient import THETA, TURNS, GradientReader, History
from monitor.record.passes.gradient_device import SpikeReader, gradient_norms
from monitor.record.passes.side_by_side import SideBySide, norms


def gradient_stats(*grads: Tensor) -> list[list[float]]:
    return GradientReader(grads).read(grads, 0).tolist()


@pytest.mark.parametrize(
    ("value", "count"), [(1e-24, 1000), (1e-38, 7), (1e30, 50), (3.0, 4), (0.0, 4), (1e-24, 30000)]
)
def test_gradient_norm_over_the_whole_range(value: float, count: int) -> None:
    """Oracle: closed form. The norm of n equal elements x is sqrt(n) x, also where squares under- or overflow."""
    norm, peak, bad, *_ = gradient_stats(torch.full((count,), value))[0]
    assert norm == pytest.approx(math.sqrt(count) * value, rel=1e-5)
    assert peak == pytest.approx(value, rel=1e-6)
    assert bad == 0


@pytest.mark.parametrize("size", [100, 100_000], ids=["small", "large"])
def test_gradient_non_finite_is_counted_and_kept(size: int) -> None:
    """Oracle: planted fault. Two NaN and one inf are three, whether or not it was the turn of their tensors."""
    g = torch.ones(size)
    g[3] = g[5] = math.nan
    inf = torch.ones(size)
    inf[7] = -math.inf
    grads = [g, inf, torch.ones(size), torch.ones(4)]
    (n1, p1, b1, *_), (n2, p2, b2, *_), (n3, _, b3, *_), (_, p4, *_) = (
        GradientReader(grads).read(grads, 3, extremes=False).tolist()
    )
    assert math.isnan(n1)
    assert math.isnan(p1)
    assert (b1, n2, p2, b2, b3, p4) == (2, math.inf, math.inf, 1, 0, 1)
    assert n3 == pytest.approx(math.sqrt(size))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_gradient_statistics_in_every_dtype(dtype: torch.dtype) -> None:
    """Oracle: dense float64 reference. 16-bit gradients, 16-bit accumulation would be off by per cents."""
    g = torch.Generator().manual_seed(0)
    grads = [torch.randn(s, generator=g).to(dtype) for s in ((7,), (60, 90), (30_000,), (1,), (300, 400))]
    grads.append(grads[-1].t())
    for values, x in zip(gradient_stats(*grads), grads, strict=True):
        assert values[0] == pytest.approx(x.double().norm().item(), rel=1e-5)
        assert values[1:3] == [pytest.approx(x.abs().max().item()), 0]


def test_gradient_absent_where_not_looked() -> None:
    """Oracle: definition. Large tensors have extremes when asked for, small ones always; absent is no number."""
    grads = [torch.ones(3), torch.ones(20_000), torch.full((20_000,), 2.0)]
    reader = GradientReader(grads)
    assert reader._turns[0] == ([2], [1])
    values = np.asarray(reader.read(grads, 0, extremes=False))
    absent = values.view(np.uint32) == ABSENT_BITS
    assert absent.tolist() == [[False] * 3 + [True] * 2, [False, True, False, True, True], [False] * 3 + [True] * 2]
    assert values[[0, 2], 1].tolist() == [1, 2]


def test_many_tiny_gradients() -> None:
    """Oracle: dense float64 reference. Groups are cut at their largest size; every tensor keeps its own numbers."""
    g = torch.Generator().manual_seed(0)
    grads = [torch.randn(int(n), generator=g) for n in torch.randint(1, 1500, (300,), generator=g)]
    found = np.asarray(GradientReader(grads).read(grads, 0))
    np.testing.assert_allclose(found[:, 0], [x.double().norm().item() for x in grads], rtol=1e-6)
    np.testing.assert_array_equal(found[:, 1], [x.abs().max().item() for x in grads])


def test_the_accelerator_sees_what_the_cpu_sees() -> None:
    """Oracle: independent computation. The way without a sync, run on a CPU, against the grouped one."""
    torch.manual_seed(0)
    grads = [torch.randn(50), torch.randn(200, 100) * 1e-25, torch.zeros(9), torch.randn(20_000), torch.randn(3, 4, 5)]
    grads[3][7] = math.inf
    grads[4] = grads[4].transpose(0, 2)
    seconds = [torch.rand_like(g) * (1e-4 if i != 1 else 1e-54) if i != 2 else None for i, g in enumerate(grads)]
    remembered, history = [v is not None for v in seconds], History(seconds, 0.99, 50)
    spikes = SpikeReader([g.numel() for g in grads], remembered)
    found = np.full((len(grads), 2), ABSENT)
    wanted = found.copy()
    for turn in range(TURNS):
        close_up = np.asarray(GradientReader(grads, remembered).read(grads, turn, history))
        np.testing.assert_allclose(gradient_norms(grads, True), close_up[:, :2], rtol=1e-6)
        np.testing.assert_array_equal(gradient_norms(grads, False)[:, 0], gradient_norms(grads, True)[:, 0])
        seen = close_up[:, 3].view(np.uint32) != ABSENT_BITS
        wanted[seen] = close_up[seen, 3:]
        at, got = spikes.read(grads, turn, history)
        assert got is not None
        found[at] = got
    np.testing.assert_allclose(found, wanted, rtol=1e-4)  # v before the step is a difference
    assert wanted[0, 0] > 0


def test_spikes_on_the_accelerator_of_what_has_no_history_and_across_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: independent computation. First gradients, enormous spikes and tensors larger than a buffer."""
    monkeypatch.setattr(side_by_side, "MOST", 1 << 10)
    torch.manual_seed(0)
    beta2, n = 0.999, 2000
    before = [torch.rand(size) + 0.5 for size in (700, 5000, 300, 40)]
    grads = [torch.randn(len(v)) for v in before]
    before[0][:10] = 0  # their first gradient
    before[2].zero_()  # nothing was ever there
    grads[1][4321], grads[0][3], grads[3][5] = 1e3, 1e3, 1e9
    seconds = [beta2 * v + (1 - beta2) * g * g for v, g in zip(before, grads, strict=True)]
    history = History(seconds, beta2, n)
    wanted = np.asarray(GradientReader(grads, [True] * 4).read(grads, 0, history))[:, 3:]
    at, got = SpikeReader([len(v) for v in before], [True] * 4).read(grads, 0, history)
    assert list(at) == [0, 1, 2, 3] and got is not None
    assert wanted[:, 0].tolist() == [1, 1, 0, 1]
    np.testing.assert_allclose(got, wanted, rtol=2e-3)


@pytest.mark.parametrize("most", [64, 1000, 1 << 24])
def test_side_by_side(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: dense float64 reference. Every element once, in order, whatever the buffers; what is empty stays it."""
    monkeypatch.setattr(side_by_side, "MOST", most)
    torch.manual_seed(0)
    tensors = [torch.randn(s) for s in ((), (0,), (70,), (30, 25), (1000,), (5,))]
    others = [t.double() for t in tensors]
    layout = SideBySide([t.numel() for t in tensors])
    sums, seen = [], []
    for sizes, a, b in layout.copies([*tensors[:3], tensors[3].T.contiguous().T, *tensors[4:]], others):
        assert len(a) == sum(sizes) <= most
        assert (a.dtype, b.dtype) == (torch.float32, torch.float64)
        np.testing.assert_array_equal(a.double(), b)
        seen.append(a.clone())
        sums.append(norms(a.split(sizes), 1))
    np.testing.assert_array_equal(torch.cat(seen), torch.cat([t.reshape(-1) for t in tensors]))
    np.testing.assert_allclose(layout.joined(sums), [t.double().abs().sum() for t in tensors])


@pytest.mark.parametrize("beta2", [0.95, 0.99, 0.999])
def test_spikes_seen_after_the_step_are_those_before_it(beta2: float) -> None:
    """Oracle: naive transcription of SPAM's rule with the second moment before the step, bias-corrected, in float64."""
    torch.manual_seed(0)
    shapes = [(3000,), (60, 190), (7,)]
    params = [torch.nn.Parameter(torch.zeros(s)) for s in shapes]
    opt = torch.optim.AdamW(params, lr=1e-3, betas=(0.9, beta2))
    reader, found = GradientReader(params, [True] * 3), 0
    for t in range(90):
        before = [opt.state[p]["exp_avg_sq"].double().clone() if t else None for p in params]
        for p in params:
            p.grad = torch.randn(p.shape)
            if t > 40 and t % 9 == 0:
                p.grad.view(-1)[:50] *= torch.logspace(0, 4, 50)[: p.numel()]
        opt.step()
        if t < 20:
            continue
        grads = [p.grad for p in params if p.grad is not None]
        got = reader.read(grads, 0, History([opt.state[p]["exp_avg_sq"] for p in params], beta2, t + 1))[:, 3:]
        for i, (g, v) in enumerate(zip(grads, before, strict=True)):
            assert v is not None
            ratio = g.double() ** 2 / (v / (1 - beta2**t))
            spiked = ratio > THETA
            found += int(spiked.sum())
            assert got[i, 0].item() == spiked.sum().item()
            if spiked.any():
                known = ratio[ratio < 1e6].max().item()  # beyond, v before the step is lost to rounding
                assert got[i, 1].item() >= known * 0.99
                if ratio.max() < 1e6:
                    assert got[i, 1].item() == pytest.approx(known, rel=1e-2)
    assert found > 40


@pytest.mark.parametrize("size", [10, 300_000], ids=["small", "in pieces"])
def test_spike_threshold_and_untouched_elements(size: int) -> None:
    """Oracle: closed form. v-hat = 1: 71 is spiked (5,041 > 5,000), 70 is not; a first gradient of 5 is not either."""
    beta2, n = 0.999, 10_001
    correction = 1 - beta2 ** (n - 1)
    for value, spiked in ((71.0, 1), (70.0, 0)):
        g = torch.zeros(size)
        g[-1], g[1] = value, 5.0
        v = torch.full((size,), correction)
        v[-1] = beta2 * correction + (1 - beta2) * value**2
        v[1] = (1 - beta2) * 25
        count, ratio = GradientReader([g], [True]).read([g], 0, History([v], beta2, n))[0, 3:].tolist()
        assert count == spiked
        assert ratio == pytest.approx(value**2 if spiked else 0, rel=1e-3)
