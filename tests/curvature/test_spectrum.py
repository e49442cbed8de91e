from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import monitor
from monitor.curvature import LossClosure, Spectrum, block_spectra, spectrum
from monitor.errors import MonitorError, UsageError


def test_one_call_measures_everything(classifier):
    """Oracle: dense reference (torch.func, float64); estimates within 4 standard errors."""
    H = classifier.hessian()
    values = torch.linalg.eigvalsh(H).flip(0).numpy()
    optimizer = torch.optim.SGD(classifier.model.parameters(), lr=0.1, momentum=0.9)
    s = spectrum(
        classifier.model, F.cross_entropy, classifier.batch, top=3, bottom=2, steps=20, samples=20, optimizer=optimizer
    )
    np.testing.assert_allclose(s.largest.values, values[:3], rtol=1e-3)
    np.testing.assert_allclose(s.smallest.values, values[::-1][:2], rtol=1e-3)
    assert s.converged and s.sharpness == s.largest.values[0] and s.notes == () and s.unused == ()
    assert s.trace and s.frobenius and s.density and s.stability
    assert abs(s.trace.value - values.sum()) < 4 * s.trace.stderr
    assert abs(s.frobenius.value - np.linalg.norm(values)) < 4 * s.frobenius.stderr
    assert s.density.nodes.max() == pytest.approx(values[0], rel=1e-4)
    assert s.stability.ratio == pytest.approx(0.1 * values[0] / 3.8, rel=1e-3) and s.stability.products == 0
    loss = F.cross_entropy(classifier.model(classifier.x), classifier.y).item()
    assert (s.operator, s.n, s.examples, s.way) == ("hessian", 79, 24, "cached") and s.loss == loss
    v = s.eigenvectors[0].double()
    assert float((H @ v - s.sharpness * v).norm()) < 1e-3 * s.sharpness
    text = repr(s)
    for part in ("Spectrum of the hessian: 79 parameters", "largest", "smallest", "trace", "Frobenius", "density"):
        assert part in text
    assert "of the edge (sharpness" in text and "products" in text and "note" not in text


@pytest.mark.parametrize("operator", ["gauss_newton", "fisher", "empirical_fisher"])
def test_other_operators_are_named_and_positive(classifier, operator):
    """Oracle: closed form (all three are positive semi-definite)."""
    s = spectrum(classifier.model, F.cross_entropy, classifier.batch, operator=operator, top=1, steps=10, samples=2)
    assert s.operator == operator and s.way is None and s.smallest.values[0] > -1e-6 < s.sharpness
    assert operator.replace("_", " ") in repr(s)


def test_float64_and_seeds(classifier):
    """Oracle: invariance: the same seed repeats bit for bit, another agrees within the tolerance."""
    run = [
        spectrum(classifier.model, F.cross_entropy, classifier.batch, dtype=torch.float64, tol=1e-8, seed=s, top=2)
        for s in (0, 0, 1)
    ]
    assert np.array_equal(run[0].largest.values, run[1].largest.values) and run[0].trace == run[1].trace
    np.testing.assert_allclose(run[0].largest.values, run[2].largest.values, rtol=1e-10)
    assert run[0].eigenvectors.dtype == torch.float64


def test_only_the_sharpness_and_a_warm_start():
    """Oracle: invariance; what is not asked for costs nothing and is None."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 5))
    batch = torch.randn(100, 20), torch.randint(0, 5, (100,))
    cold = spectrum(model, F.cross_entropy, batch, top=1, bottom=0, steps=0, samples=0)
    assert cold.density is None is cold.trace and cold.products < 40 and len(cold.smallest) == 0
    assert "density" not in repr(cold) and "smallest" not in repr(cold)
    warm = [
        spectrum(model, F.cross_entropy, batch, top=1, bottom=0, steps=0, samples=0, start=cold, seed=s)
        for s in range(5)
    ]
    colds = [spectrum(model, F.cross_entropy, batch, top=1, bottom=0, steps=0, samples=0, seed=s) for s in range(1, 6)]
    assert sum(w.products for w in warm) < sum(c.products for c in colds)
    for s in warm + colds:
        assert s.sharpness == pytest.approx(cold.sharpness, rel=1e-3)
    # a density is never seen from a warm start: it has its own
    dense = spectrum(model, F.cross_entropy, batch, top=1, bottom=0, steps=10, samples=0, start=cold)
    assert dense.density is not None and dense.products >= 20 and len(dense.density.nodes) == 10


def test_memory_cap(classifier):
    """Oracle: invariance; the cap is kept by restarts, which the result mentions."""
    capped = spectrum(
        classifier.model, F.cross_entropy, classifier.batch, memory=12 * 79 * 4, top=1, bottom=1, tol=1e-4
    )
    whole = spectrum(classifier.model, F.cross_entropy, classifier.batch, top=1, bottom=1, tol=1e-4)
    assert capped.sharpness == pytest.approx(whole.sharpness, rel=1e-4)
    assert any("restarts" in note for note in capped.notes) and not whole.notes


def test_what_limits_the_result_is_said(classifier):
    """Oracle: planted fault (too few products; a parameter that is not used)."""
    classifier.model.register_parameter("spare", nn.Parameter(torch.ones(3)))
    s = spectrum(classifier.model, F.cross_entropy, classifier.batch, max_products=8, steps=4, samples=2, top=4)
    assert not s.converged and s.unused == ("spare",)
    assert "not everything converged" in s.notes[0] and "does not depend on spare" in s.notes[1]


def test_blocks_are_the_diagonal_blocks(classifier):
    """Oracle: dense reference."""
    H = classifier.hessian()
    found = block_spectra(classifier.model, F.cross_entropy, classifier.batch, top=2, steps=5, samples=2)
    assert list(found) == ["0", "2", "4"]
    start = 0
    for block in found.values():
        part = H[start : start + block.n, start : start + block.n]
        np.testing.assert_allclose(block.largest.values, torch.linalg.eigvalsh(part).flip(0)[:2], rtol=1e-3)
        start += block.n
    assert start == 79
    one = block_spectra(
        classifier.model, F.cross_entropy, classifier.batch, blocks=["4"], dtype=torch.float64, top=1, steps=3
    )
    assert list(one) == ["4"] and one["4"].eigenvectors.dtype == torch.float64


def test_default_blocks_look_into_containers():
    """Oracle: golden."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(5, 4)
            self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh())])
            self.norm = nn.LayerNorm(4, elementwise_affine=False)
            self.head = nn.Linear(4, 5)

        def forward(self, x):
            h = self.embed(x)
            for layer in self.layers:
                h = h + layer(h)
            return self.head(self.norm(h))

    batch = torch.arange(5), torch.arange(5)
    found = block_spectra(Model(), F.cross_entropy, batch, top=1, bottom=0, steps=0, samples=0)
    assert list(found) == ["embed", "layers.0", "layers.1.0", "head"]


def test_the_public_name(classifier):
    """Oracle: golden; the package offers the function, not the module it lives in."""
    closure = LossClosure(classifier.model, F.cross_entropy, classifier.batch)
    s = monitor.curvature.spectrum(classifier.model, closure, top=1, steps=3, samples=2)  # type: ignore[attr-defined]
    assert isinstance(s, Spectrum)


def test_a_transformers_model():
    """Oracle: difference of float64 gradients, on a model that returns its own loss and uses fused attention."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError as e:
        pytest.skip(f"transformers does not import here: {e}")
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=16, vocab_size=32, n_positions=16, bos_token_id=None, eos_token_id=None
    )
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).train()
    ids = torch.randint(0, 32, (3, 12))
    closure = LossClosure(model, None, {"input_ids": ids, "labels": ids}, dtype=torch.float64)
    s = spectrum(model, closure, top=2, bottom=0, steps=0, samples=0, tol=1e-6)
    v, h = s.eigenvectors[0], 1e-4
    point = closure.point()
    Hv = (closure.gradient(point.moved(h * v)) - closure.gradient(point.moved(-h * v))) / (2 * h)
    torch.testing.assert_close(Hv, s.sharpness * v, rtol=1e-3, atol=1e-4 * s.sharpness)
    assert s.way == "cached" and model.training and s.examples == 3


def test_agrees_with_a_second_independent_library(classifier):
    """Oracle: independent library (hessian-eigenthings), both ends of the spectrum."""
    library = pytest.importorskip("hessian_eigenthings")
    H = library.HessianOperator(classifier.model, [classifier.batch], library.supervised_loss(nn.CrossEntropyLoss()))
    s = spectrum(classifier.model, F.cross_entropy, classifier.batch, top=3, bottom=2, steps=0, samples=0)
    for found, which in ((s.largest, "LA"), (s.smallest, "SA")):
        theirs = library.lanczos(H, k=len(found), max_iter=25, tol=1e-6, which=which, seed=0).eigenvalues
        np.testing.assert_allclose(np.sort(found.values), np.sort(theirs.numpy()), rtol=1e-3)


def test_a_data_parallel_wrapper_is_looked_through(tmp_path):
    """Oracle: invariance (a group of one rank changes nothing), and the reducer works afterwards."""
    _rank(0, 1, tmp_path / "store")


@pytest.mark.slow
def test_ranks_average_their_products(tmp_path):
    """Oracle: invariance: two ranks with half the data each give the Hessian of all of it, on both ranks."""
    torch.multiprocessing.spawn(_rank, args=(2, tmp_path / "store"), nprocs=2)


def _rank(rank: int, ranks: int, store: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
    x, y = torch.randn(20, 4), torch.randint(0, 3, (20,))
    whole = spectrum(model, F.cross_entropy, (x, y), top=2, steps=6, samples=4)
    part = slice(20 // ranks * rank, 20 // ranks * (rank + 1))
    wrapped = nn.parallel.DistributedDataParallel(model)
    for loss in (
        LossClosure(wrapped, F.cross_entropy, (x[part], y[part]), group=dist.group.WORLD),
        LossClosure(wrapped, lambda: F.cross_entropy(wrapped(x[part]), y[part]), group=dist.group.WORLD),
    ):
        half = spectrum(wrapped, loss, top=2, steps=6, samples=4)
        np.testing.assert_allclose(half.largest.values, whole.largest.values, rtol=1e-4)
        assert half.trace and whole.trace
        assert abs(half.trace.value - whole.trace.value) < 1e-3 * abs(whole.trace.value)
        assert abs(half.loss - whole.loss) < 1e-6
    F.cross_entropy(wrapped(x[part]), y[part]).backward()  # the reducer is as it was: this would raise otherwise
    F.cross_entropy(wrapped(x[part]), y[part]).backward()
    dist.destroy_process_group()


def test_messages(classifier):
    """Oracle: planted fault."""
    closure = LossClosure(classifier.model, F.cross_entropy, classifier.batch)
    with pytest.raises(UsageError, match="already has its data"):
        spectrum(classifier.model, closure, classifier.batch)
    with pytest.raises(UsageError, match="operator='hesse'; expected one of hessian, gauss_newton"):
        spectrum(classifier.model, closure, operator="hesse")  # type: ignore[arg-type]
    with torch.no_grad():
        classifier.model[0].weight[0, 0] = float("nan")
    with pytest.raises(MonitorError, match="not finite"):
        spectrum(classifier.model, F.cross_entropy, classifier.batch)
