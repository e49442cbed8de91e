"""Gradients along their weights: the pass, what is recorded of a training, and the identity with the logits."""

from __future__ import annotations

from math import inf, nan
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import monitor
from monitor.record.passes.alignment import alignment_stats
from monitor.record.passes.parameter import ParameterReader


def dense(g: Tensor, w: Tensor) -> list[float]:
    """Inner product and norms in float64."""
    g, w = g.double(), w.double()
    return [(g * w).sum().item(), g.norm().item(), w.norm().item()]


def aligned(grads: list[Tensor], weights: list[Tensor]) -> np.ndarray:
    """What is read on a CPU."""
    held = [w.contiguous() for w in weights]
    return np.asarray(ParameterReader(held, held).read(weights, grads, distances=False)[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_statistics_of_a_tensor(dtype: torch.dtype) -> None:
    """Oracle: dense float64 reference. Below, at and above the size of a piece, in rows and in columns."""
    torch.manual_seed(0)
    weights = [torch.randn(shape).to(dtype) for shape in ((), (7,), (1, 1 << 16), (300, 257), (4, 3, 2, 2))]
    grads = [(0.01 * torch.randn(w.shape) - 0.003 * w.float()).to(dtype) for w in weights]
    weights[3], grads[3] = weights[3].T, grads[3].T.clone(memory_format=torch.contiguous_format)
    weights[4] = weights[4].to(memory_format=torch.channels_last)
    expected = torch.tensor([dense(g, w) for g, w in zip(grads, weights, strict=True)], dtype=torch.float64)
    np.testing.assert_allclose(aligned(grads, weights), expected, rtol=2e-6, atol=1e-6)
    small = [0, 1, 4]
    exact = aligned([grads[i] for i in small], [weights[i] for i in small])
    np.testing.assert_allclose(exact, expected[small], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(alignment_stats(grads, weights), expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e-20, 1e-12, 1e25])
def test_sizes_that_float32_cannot_square(size: float) -> None:
    """Oracle: closed form. Gradients of ``-size`` along weights of ones: a cosine of 1, whatever the size."""
    n = 50_000
    grad = torch.full((n,), -size)
    dot, norm, weights = aligned([grad], [torch.ones(n)])[0].tolist()
    stored = -grad[0].item()  # of 1e-40, not a normal number any more, some bits are left
    assert norm == pytest.approx(stored * n**0.5, rel=1e-6)
    assert -dot / (norm * weights) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("bad", [nan, inf])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    """Oracle: closed form. One element spoils the sums it is in, and those of its own tensor only."""
    grads = [torch.tensor([1.0, bad]), torch.tensor([3.0, 4.0])]
    got = aligned(grads, [torch.tensor([1.0, 1.0]), torch.tensor([4.0, -3.0])])
    assert not np.isfinite(got[0, :2]).any()
    assert got[0, 2].item() == pytest.approx(2**0.5)
    assert got[1].tolist() == [0, 5, 5]


def test_recorded_at_the_weights_the_gradient_was_taken_at(tmp_path: Path) -> None:
    """Oracle: naive transcription of the definition. Clipped and decayed, large steps, a layer without a gradient.

    Every step at first, then every tenth; of parameters that are frozen or get no gradient there is nothing.
    """
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(6, 9), "b": nn.Linear(9, 4), "unused": nn.Linear(3, 3)})
    model["b"].bias.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    model.forward = lambda x: model["b"](torch.tanh(model["a"](x)))
    names = [n for n, p in model.named_parameters() if p.requires_grad and not n.startswith("unused")]
    expected: dict[int, list[float]] = {}
    with monitor.attach(model, tmp_path / "run"):
        for step in range(25):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(8, 6)), torch.randint(0, 4, (8,))).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            pairs = [(p.grad, p) for n, p in model.named_parameters() if n in names]
            each = np.array([dense(g, p.detach()) for g, p in pairs if g is not None])
            whole = -each[:, 0].sum() / np.sqrt(np.square(each[:, 1]).sum() * np.square(each[:, 2]).sum())
            expected[step] = [*(-each[:, 0] / (each[:, 1] * each[:, 2])), whole]
            optimizer.step()
    run = monitor.open(tmp_path / "run")
    assert run.warnings == []
    assert sorted(run.modules("nlm_cos.cos")) == sorted(names)
    for i, series in enumerate([*(run.series("nlm_cos.cos", n) for n in names), run.series("nlm_cos.total", "")]):
        assert series[0].tolist() == [*range(10), 10, 20]
        np.testing.assert_allclose(series[1], [expected[s][i] for s in series[0].tolist()], rtol=2e-5, atol=1e-6)


def test_sparse_gradients_are_left_out(tmp_path: Path) -> None:
    """Oracle: planted fault. A gradient that has some of the rows only is not compared with all of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.EmbeddingBag(20, 4, sparse=True), nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with monitor.attach(model, tmp_path / "run"):
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randint(0, 20, (8, 2))), torch.randint(0, 3, (8,))).backward()
            optimizer.step()
    run = monitor.open(tmp_path / "run")
    assert run.warnings == []
    assert sorted(run.modules("nlm_cos.cos")) == ["1.bias", "1.weight"]
    assert len(run.series("update_ratio.ratio", "0.weight")[0]) == 3


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_every_layer_has_the_rate_that_the_logits_have(micro_batches: int, tmp_path: Path) -> None:
    """Oracle: closed form, Euler's identity. −⟨g_l, W_l⟩ of every layer is nlm_rate: a wrong gradient would show.

    cos · ‖g‖ · ‖W before the update‖, from recorded columns alone, in a ReLU network without biases.
    """
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(10, 20, bias=False), nn.ReLU(), nn.Linear(20, 15, bias=False), nn.LeakyReLU(0.1),
        nn.Linear(15, 7, bias=False),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    x, y = torch.randn(40, 10), torch.randint(0, 7, (40,))
    with monitor.attach(model, tmp_path / "run"):
        for _ in range(10):
            optimizer.zero_grad()
            for a, b in zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True):
                (F.cross_entropy(model(a), b) / micro_batches).backward()
            optimizer.step()
    run = monitor.open(tmp_path / "run")
    _, rate = run.series("nlm_rate.rate", "cross_entropy")
    assert rate[0] < 0 < rate[-1]
    for name in run.modules("nlm_cos.cos"):
        cos, norm, weights = (run.series(ref, name)[1] for ref in ("nlm_cos.cos", "grad_norm.norm", "param_norm.norm"))
        np.testing.assert_allclose((cos * norm)[1:] * weights[:-1], rate[1:], rtol=2e-5, atol=2e-7)
