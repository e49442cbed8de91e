"""The probes for the way from memorising to generalising: their formulas, and that they leave no trace."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import monitor
from monitor.errors import UsageError
from monitor.probes.embedding_gini import EmbeddingGini, fourier_norms, gini
from monitor.probes.fourier import STATS, FourierLosses, fourier_losses
from monitor.probes.local_complexity import LocalComplexity, cuts, orthonormal
from monitor.probes.odd_fraction import OddFraction, linear_fit, odd_fraction


def omega(f: Tensor, mirrored: Tensor) -> float:
    _, odd, even = odd_fraction(f[:, None], mirrored[:, None])
    return odd / (odd + even)


def test_odd_fraction_of_polynomials() -> None:
    """Oracle: closed form. w·x + b is odd up to a constant, x1² − x2² even; x1 + x1 x2 half and half (n = 100,000)."""
    x = torch.randn(100_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, b = x.T
    assert omega(a - 2 * b + 3, -a + 2 * b + 3) == pytest.approx(1, abs=1e-12)
    assert omega(a**2 - b**2, a**2 - b**2) == 0
    assert omega(a + a * b, -a + a * b) == pytest.approx(0.5, abs=0.01)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.floats(-50, 50))
def test_odd_fraction_ignores_what_a_softmax_does_not_see(seed: int, shift: float) -> None:
    """Oracle: invariance. A number added to all values of a row changes nothing; the share lies in [0, 1]."""
    g = torch.Generator().manual_seed(seed)
    f, mirrored = (torch.randn(16, 3, dtype=torch.float64, generator=g) for _ in range(2))
    base = odd_fraction(f, mirrored)
    moved = odd_fraction(f + shift * f[:, :1], mirrored - shift)
    assert moved == pytest.approx(base, rel=1e-9)
    assert 0 <= base[1] / (base[1] + base[2]) <= 1


def test_linear_fit() -> None:
    """Oracle: closed form. An exact map leaves nothing; of y = x + noise with equal variances half; of noise all."""
    g = torch.Generator().manual_seed(0)
    x, noise = torch.randn(100_000, 4, generator=g, dtype=torch.float64).split([3, 1], dim=1)
    noise = noise[:, 0]
    for f, left in ((2 * x[:, 0] - x[:, 2] + 1, 0), (x[:, 0] + noise, 0.5), (noise, 1)):
        n, residual, total = linear_fit(x, f[:, None])
        assert n == 100_000
        assert residual / total == pytest.approx(left, abs=0.01)


class Unit(nn.Module):
    """One ReLU unit with w = e1 and no bias."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x[:, :1])


def test_one_unit_is_cut_near_its_kink() -> None:
    """Oracle: closed form. At x = .1 e1 the vertices x ± .2 e1 stand on both sides of the kink, at x = e1 on one."""
    counts = cuts(Unit(), torch.tensor([[0.1, 0.0], [1.0, 0.0]]), 0.2 * torch.tensor([[1.0, 0.0]]))
    assert counts == {"": (2, 1.0, 1.0)}


def test_local_complexity_against_single_forwards() -> None:
    """Oracle: naive transcription. Vertex by vertex and unit by unit, also for an in-place and a functional layer."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 9), nn.ReLU(inplace=True), nn.Linear(9, 7), nn.GELU(), nn.Linear(7, 2))
    x, v = torch.randn(5, 6), 0.3 * orthonormal(4, 6)
    want = {"1": 0, "3": 0}
    with torch.no_grad():
        for row in x:
            vertices = [row + s * d for d in v for s in (1, -1)]
            first = torch.stack([net[0](p) for p in vertices])
            second = torch.stack([net[2](F.relu(net[0](p))) for p in vertices])
            for name, z in (("1", first), ("3", second)):
                want[name] += int(((z > 0).any(0) & (z <= 0).any(0)).sum())
        got = cuts(net, x, v)
    assert {name: (n, cut) for name, (n, cut, _) in got.items()} == {name: (5, cut) for name, cut in want.items()}
    assert [units for _, _, units in got.values()] == [9, 7]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_directions_are_orthonormal() -> None:
    """Oracle: definition. V Vᵀ = I, and the same every time."""
    v = orthonormal(5, 12)
    assert (v @ v.T - torch.eye(5)).abs().max() < 1e-6
    assert torch.equal(v, orthonormal(5, 12))


def test_gini() -> None:
    """Oracle: closed form. Equal: 0; one of ten: .9; 1, 2, 3, 4 in any order and sign: .25."""
    assert gini(torch.ones(7)) == 0
    assert gini(F.one_hot(torch.tensor(3), 10)) == pytest.approx(0.9)
    assert gini(torch.tensor([3.0, -1, 4, 2])) == pytest.approx(0.25)


@pytest.mark.parametrize("n", [7, 8])
def test_fourier_norms(n: int) -> None:
    """Oracle: closed form and invariance. A wave has one non-zero coefficient; energies add up (Parseval)."""
    wave = torch.cos(2 * math.pi * 2 / n * torch.arange(n))[:, None] * torch.tensor([[3.0, 4.0]])
    assert int((fourier_norms(wave) > 1e-5).sum()) == 1
    assert gini(fourier_norms(wave)) == pytest.approx(1 - 1 / n, abs=1e-5)
    table = torch.randn(n, 5, dtype=torch.float64)
    assert fourier_norms(table).norm().item() == pytest.approx(table.norm().item(), rel=1e-12)


def grid(p: int) -> tuple[Tensor, Tensor]:
    a, b = (t.flatten() for t in torch.meshgrid(torch.arange(p), torch.arange(p), indexing="ij"))
    return torch.stack([a, b], 1), (a + b) % p


def naive_split(logits: Tensor, labels: Tensor, train: Tensor, p: int) -> dict[str, float]:
    """The definition with explicit unit vectors of length p²."""
    pairs, _ = grid(p)
    z = logits.double() - logits.double().mean(1, keepdim=True)
    parts = []
    for w in range(1, p // 2 + 1):
        angle = 2 * math.pi * w * pairs.sum(1).double() / p
        u = [f(angle) / f(angle).norm() for f in (torch.cos, torch.sin)]
        parts.append(sum(torch.outer(e, e @ z) for e in u))
    energy = torch.stack([c.square().sum() for c in parts]) / (z - z.mean(0)).square().sum()
    keys = [c for c, e in zip(parts, energy, strict=True) if e > 0.02]
    kept = sum(keys, start=torch.zeros_like(z))
    restricted = kept + (z - kept).mean(0)
    ce = F.cross_entropy
    return {
        "restricted": ce(restricted[~train], labels[~train]).item(),
        "excluded": ce((z - kept)[train], labels[train]).item(),
        "excluded_one": max(ce((z - c)[train], labels[train]).item() for c in keys),
        "train": ce(logits.double()[train], labels[train]).item(),
        "test": ce(logits.double()[~train], labels[~train]).item(),
        "keys": len(keys),
        "key_share": energy[energy > 0.02].sum().item(),
    }


def test_fourier_losses() -> None:
    """Oracle: naive transcription, on waves of two frequencies plus a memorised and a random part."""
    p = 11
    g = torch.Generator().manual_seed(0)
    pairs, labels = grid(p)
    train = torch.rand(p * p, generator=g) < 0.5
    angle = 2 * math.pi / p * (pairs.sum(1)[:, None] - torch.arange(p))
    logits = 2 * torch.cos(3 * angle) + torch.cos(5 * angle) + torch.randn(p * p, p, generator=g)
    logits[train] += 4 * F.one_hot(labels, p)[train]
    found = fourier_losses(logits, labels, train, p)
    want = naive_split(logits, labels, train, p)
    assert dict(zip(STATS, found.stats, strict=True)) == pytest.approx(want, rel=1e-9)
    assert len(found.shares) == p // 2
    assert 0 < found.shares.sum() < 1


def test_fourier_losses_of_nothing_but_a_circuit() -> None:
    """Oracle: closed form. Pure waves: restricted is the loss itself, and without them every class is as likely."""
    p = 11
    pairs, labels = grid(p)
    train = torch.arange(p * p) % 3 > 0
    angle = 2 * math.pi / p * (pairs.sum(1)[:, None] - torch.arange(p)).double()
    found = dict(zip(STATS, fourier_losses(5 * torch.cos(4 * angle), labels, train, p).stats, strict=True))
    assert found["restricted"] == pytest.approx(found["test"], rel=1e-9)
    assert (found["excluded"], found["excluded_one"]) == (pytest.approx(math.log(p)), pytest.approx(math.log(p)))
    assert (found["keys"], found["key_share"]) == (1, pytest.approx(1))


@pytest.mark.parametrize(
    "make",
    [
        lambda: OddFraction(torch.arange(4)),
        lambda: OddFraction(torch.tensor([[1.0], [math.inf]])),
        lambda: LocalComplexity(torch.randn(3, 4), directions=5),
        lambda: LocalComplexity(torch.randn(3, 40), radius=0),
        lambda: FourierLosses(torch.zeros(8, 2), torch.zeros(9), torch.ones(9) > 0, 3),
        lambda: FourierLosses(torch.zeros(9, 2), torch.zeros(9), torch.ones(9) > 0, 3),
    ],
)
def test_bad_arguments_are_named(make: object) -> None:
    """Oracle: planted fault. The message says what was given and what is expected."""
    with pytest.raises(UsageError, match="expected"):
        make()  # pyright: ignore[reportCallIssue]


class Adder(nn.Module):
    """Embedding, a dropped-out hidden layer with batch statistics, logits."""

    def __init__(self, p: int) -> None:
        super().__init__()
        self.embed, self.drop = nn.Embedding(p, 8), nn.Dropout(0.2)
        self.hidden, self.norm, self.out = nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Linear(32, p)

    def forward(self, pairs: Tensor) -> Tensor:
        return self.out(self.drop(F.relu(self.norm(self.hidden(self.embed(pairs).flatten(1))))))


def add(observed: Path | None) -> list[Tensor]:
    p = 7
    torch.manual_seed(0)
    pairs, labels = grid(p)
    train = torch.rand(p * p) < 0.6
    model = Adder(p)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    handle = None
    if observed is not None:
        probes = [FourierLosses(pairs, labels, train, p, every=5), EmbeddingGini(p, every=5), EmbeddingGini()]
        handle = monitor.attach(model, observed, probes=probes)
    for _ in range(20):
        loss = F.cross_entropy(model(pairs[train]), labels[train])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if handle is not None:
        handle.close()
    return [*model.state_dict().values(), torch.get_rng_state()]


def test_nothing_changes_and_everything_is_recorded(tmp_path: Path) -> None:
    """Oracle: invariance. Bitwise the same training; the columns stand at the steps asked for."""
    for a, b in zip(add(None), add(tmp_path / "run"), strict=True):
        assert torch.equal(a, b)
    run = monitor.open(tmp_path / "run")
    assert run.warnings == []
    steps, values = run.series("restricted_loss.restricted")
    assert steps.tolist() == [0, 5, 10, 15]
    assert (values > 0).all()
    steps, values = run.series("gini.gini", "embed.weight")
    assert {0, 5, 10, 15} <= set(steps.tolist())
    assert ((values > 0) & (values < 1)).all()
    table = run.table("fourier", 5)
    assert table.column_names == ["frequency", "share"]
    assert table.num_rows == 3


def fit(observed: Path | None) -> list[Tensor]:
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    y = x[:, 0] * x[:, 1]
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(inplace=True), nn.Dropout(0.1), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    handle = None
    if observed is not None:
        probes = [OddFraction(x, every=5), LocalComplexity(x[:8], radius=0.3, directions=3, every=5)]
        handle = monitor.attach(model, observed, probes=probes)
    for _ in range(11):
        loss = F.mse_loss(model(x)[:, 0], y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if handle is not None:
        handle.close()
    return [*model.state_dict().values(), torch.get_rng_state()]


def test_function_probes_in_a_run(tmp_path: Path) -> None:
    """Oracle: invariance, and the formulas on the model itself at the first step."""
    for a, b in zip(fit(None), fit(tmp_path / "run"), strict=True):
        assert torch.equal(a, b)
    run = monitor.open(tmp_path / "run")
    assert run.warnings == []
    for ref, module in (("odd_fraction.omega", ""), ("linear_r2.r2", ""), ("local_complexity.cut", "1")):
        steps, values = run.series(ref, module)
        assert steps.tolist() == [0, 5, 10]
        assert (values > 0).all()
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 1)).eval()
    with torch.no_grad():
        _, odd, even = odd_fraction(model(x), model(-x))
        _, cut, _ = cuts(model, x[:8], 0.3 * orthonormal(3, 6))["1"]
    assert run.series("odd_fraction.omega")[1][0] == pytest.approx(odd / (odd + even), rel=1e-6)
    assert run.series("local_complexity.cut", "1")[1][0] == pytest.approx(cut / 8, rel=1e-6)


def test_a_model_that_answers_otherwise_says_so(tmp_path: Path) -> None:
    """Oracle: planted fault. The probe is given up with the reason; the training and the recording go on."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.layer(x), x

    model = Two()
    handle = monitor.attach(model, tmp_path / "run", probes=[OddFraction(torch.randn(9, 4), every=1)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.randn(5, 4))[0].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    handle.close()
    run = monitor.open(tmp_path / "run")
    assert any("the model answered with tuple" in w for w in run.warnings)
    assert run.steps == 3
