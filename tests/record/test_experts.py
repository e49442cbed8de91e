"""The parameters of experts: found beside their router, in lists and fused, and measured right."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import monitor
from monitor.record.experts import Router
from monitor.record.passes.experts import ENTRIES, FEWEST, alike, norms, sample
from tests.record import moe, trainings


def test_norms_and_cosines_of_three_experts() -> None:
    """Oracle: closed form. (3, 4), twice that, and something at right angles; a vector adds to the norm alone."""
    fused = torch.zeros(3, 2, 2)
    fused[0, 0], fused[1, 0], fused[2, 1, 0] = torch.tensor([3.0, 4]), torch.tensor([6.0, 8]), 12.0
    bias = [torch.zeros(1), torch.zeros(1), torch.tensor([5.0])]
    parts = [fused, bias]
    assert norms(parts).flatten().tolist() == pytest.approx([5, 10, 13])
    at = sample(parts)
    assert [len(i) for i in at] == [4, 0]
    assert alike(parts, at).tolist() == pytest.approx([1 / 3, 1, 4])


def test_against_float64() -> None:
    """Oracle: dense float64 reference; fused and in a list are the same; half precision is added up in float32."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(5, 40, 30, generator=g, dtype=torch.float64)
    w[3] = 0.5 * w[1] + 0.1 * w[3]
    fused: list[Tensor | list[Tensor]] = [w.float()]
    apart: list[Tensor | list[Tensor]] = [[x.float() for x in w]]
    flat = w.flatten(1)
    c = F.normalize(flat, dim=1) @ F.normalize(flat, dim=1).T
    pairs = c[tuple(torch.triu_indices(5, 5, 1))]
    for parts in (fused, apart):
        torch.testing.assert_close(norms(parts).flatten().double(), flat.norm(dim=1), rtol=1e-6, atol=0)
        expected = [pairs.mean().item(), pairs.max().item(), 1200]
        assert alike(parts, sample(parts)).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    half = [w.to(torch.bfloat16)]
    torch.testing.assert_close(norms(half).flatten(), half[0].float().flatten(1).norm(dim=1))


def test_a_sample_is_fixed_bounded_and_unbiased() -> None:
    """Oracle: definition. The same entries every time; unrelated experts scatter round 0 by 1/√entries."""
    g = torch.Generator().manual_seed(1)
    parts: list[Tensor | list[Tensor]] = [torch.randn(64, 100, 200, generator=g), torch.randn(64, 50, 40, generator=g)]
    state = torch.get_rng_state()
    first, second = sample(parts), sample(parts)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert sum(map(len, first)) == max(ENTRIES // 64, FEWEST)
    assert len(first[0]) / len(first[1]) == pytest.approx(10, rel=0.02)  # by size
    mean, largest, entries = alike(parts, first).tolist()
    assert abs(mean) < 0.003 and 2 / math.sqrt(entries) < largest < 6 / math.sqrt(entries)


def test_not_finite_is_kept() -> None:
    """Oracle: planted fault. One expert of zeros has no direction, one NaN no norm."""
    parts: list[Tensor | list[Tensor]] = [torch.tensor([[[1.0, math.nan]], [[0.0, 0.0]], [[1.0, 0.0]]])]
    assert norms(parts).flatten().isnan().tolist() == [True, False, False]
    mean, largest, _ = alike(parts, sample(parts)).tolist()
    assert math.isnan(mean) and math.isnan(largest)


class Odd(nn.Module):
    """Two routers of different size beside a convolution and a list that is none of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.inner: Any
        self.lonely: Any
        self.conv = nn.Conv1d(3, 4, 2)
        self.blocks = nn.ModuleList(nn.Linear(n, 2) for n in (3, 4, 5, 6))
        self.inner = nn.Module()
        self.inner.router = nn.Linear(6, 4)
        self.inner.experts = nn.Module()
        self.inner.experts.up = nn.Parameter(torch.ones(4, 6, 8))
        self.inner.experts.down = nn.Parameter(torch.ones(4, 8, 6))
        self.lonely = nn.Linear(6, 4)


def test_what_is_taken_for_experts() -> None:
    """Oracle: planted fault. Neither a convolution nor a list of unlike modules are; a dead router has none."""
    model = Odd()
    inner = Router.of([model], "inner.router", model.inner.router.weight, True, 2)
    assert [tuple(p.shape) for p in inner.parts([model]) if isinstance(p, Tensor)] == [(4, 6, 8), (4, 8, 6)]
    assert inner.lineage([model]) == [model.inner.router, model.inner, model]
    apart = nn.ModuleDict({"conv": model.conv, "blocks": model.blocks, "lonely": model.lonely})
    lonely = Router.of([model], "lonely", model.lonely.weight, True, 2)
    assert lonely.parts([apart]) == []
    model.lonely = apart["lonely"] = nn.Linear(6, 4)
    assert lonely.weight is None and lonely.lineage([apart]) == []


@pytest.mark.parametrize("client", moe.CLIENTS)
def test_unmodified_transformers(client: str, tmp_path: Path) -> None:
    """Oracle: dense float64 reference from the model's own parameters, by their names, after the update."""
    pytest.importorskip("transformers")
    model = moe.client(client)
    recorded = moe.train(model, tmp_path / "run", steps=1)
    for path, m in model.named_modules():
        if path.endswith(".experts"):
            fused = [p.detach().double().flatten(1) for p in m.parameters()]
            gate = path.removesuffix("experts") + "gate"
            expected = torch.cat(fused, 1).norm(dim=1).tolist()
            found = [recorded.series("expert_norm.norm", f"{gate}[{e}]")[1][0] for e in range(8)]
            assert found == pytest.approx(expected, rel=1e-6)
            # all of an expert's entries fit into the sample
            w = F.normalize(torch.cat(fused, 1), dim=1)
            largest = (w @ w.T)[tuple(torch.triu_indices(8, 8, 1))].max().item()
            assert recorded.series("expert_similarity.largest", gate)[1][0] == pytest.approx(largest, abs=1e-6)
            assert recorded.series("expert_similarity.entries", gate)[1][0] == fused[0].shape[1] + fused[1].shape[1]


def test_a_list_of_experts_every_hundred_steps(tmp_path: Path) -> None:
    """Oracle: dense float64 reference. Modules in a list, biases in the norm; steps 0 and 100 and no others."""
    trainings.seed()
    model = trainings._Experts()
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    after: list[list[float]] = []
    with monitor.attach(model, tmp_path / "run"):
        for x, y in trainings.batches(102):
            F.cross_entropy(model(x), y).backward()
            opt.step()
            opt.zero_grad()
            each = [torch.cat([p.detach().double().flatten() for p in e.parameters()]) for e in model.experts]
            after.append([w.norm().item() for w in each])
    recorded = monitor.open(tmp_path / "run")
    assert not recorded.warnings
    steps, values = recorded.series("expert_norm.norm", "router[3]")
    assert steps.tolist() == [0, 100]
    assert values == pytest.approx([after[0][3], after[100][3]], rel=1e-6)
