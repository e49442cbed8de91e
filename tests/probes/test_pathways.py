"""Pathways: distances, smoothness and dimensions against closed forms, the probe against the model's own routers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import monitor
from monitor.probes import Pathways
from monitor.record.passes import pathway
from tests.record import moe, trainings


def naive(a: Sequence[int], b: Sequence[int]) -> int:
    """Wagner and Fischer (1974), as it is written."""
    d = [[i + j if i * j == 0 else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            d[i][j] = min(d[i - 1][j] + 1, d[i][j - 1] + 1, d[i - 1][j - 1] + (a[i - 1] != b[j - 1]))
    return d[-1][-1]


def test_edit_distances() -> None:
    """Oracle: naive transcription, of sequences of all lengths at once; and kitten to sitting is 3."""
    rng = np.random.default_rng(0)
    a, b = ([rng.integers(-1, 4, rng.integers(0, 14)).tolist() for _ in range(150)] for _ in range(2))
    a[0], b[0], b[1] = [ord(c) for c in "kitten"], [ord(c) for c in "sitting"], a[1]
    found = pathway.edit_distances(a, b)
    assert found.tolist() == [naive(x, y) for x, y in zip(a, b, strict=True)]
    assert found[:2].tolist() == [3, 0]


def test_what_a_pathway_is() -> None:
    """Oracle: closed form. Experts until the sum exceeds 0.7, which 0.7 itself does not; equal ones in their order."""
    one = np.array([[0.1, 0.6, 0.3], [0.75, 0.2, 0.05], [0.5, 0.25, 0.25]])
    two = np.array([[0.0, 1.0, 0.0], [0.4, 0.2, 0.4], [0.34, 0.33, 0.33]])
    layers = [pathway.experts_of(g, 0.7) for g in (one, two)]
    assert layers == [[[1, 2], [0], [0, 1]], [[1], [0, 2], [0, 1, 2]]]
    assert pathway.experts_of(np.array([[0.5, 0.5]]), 0.5) == [[0, 1]]
    assert pathway.written(layers) == ["1,2-1", "0-0,2", "0,1-0,1,2"]
    assert pathway.symbols(layers) == [[1, 2, -1, 1], [0, -1, 0, 2], [0, 1, -1, 0, 1, 2]]
    assert pathway.chosen_of(two, 2) == [[1, 0], [0, 2], [0, 1]]


def test_distances_by_hand() -> None:
    """Oracle: closed form. Two samples: "10,3-2" and "10-2" are 1 of 4 symbols apart, and 2 characters."""
    first = np.zeros((2, 12))
    first[0, [10, 3]], first[1, 10] = (0.6, 0.4), 1
    second = np.zeros((2, 12))
    second[:, 2] = 1
    # at 0.5 both ways are the same; of the two largest the others are the first of zero weight
    found = pathway.distances([first, second], [1, 1])
    assert found == [1 / 4, 0, 0, 2, 2, 1]
    assert np.isnan(pathway.distances([first * np.nan, second], [1, 1])[:4]).all()


def test_pairs_are_seeded_different_and_bounded() -> None:
    """Oracle: definition. 200 pairs, all of few samples, and 16 of endless pathways."""
    pairs = pathway.pairs_of(100, 40)
    assert len({tuple(p) for p in pairs.tolist()}) == len(pairs) == 200
    assert (pairs[:, 0] < pairs[:, 1]).all()
    np.testing.assert_array_equal(pairs, pathway.pairs_of(100, 60))
    assert len(pathway.pairs_of(5, 40)) == 10
    assert len(pathway.pairs_of(100, 10**5)) == 16


def angles(*degrees: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """One sample whose routing embeddings point where they are told, layer by layer."""
    weights = [np.array([[math.cos(math.radians(a)), math.sin(math.radians(a))]]) for a in degrees]
    return [np.ones((1, 1))] * len(degrees), weights


@pytest.mark.parametrize(
    ("degrees", "expected", "mean"),
    [
        ((30, 30, 30), 1e-8, 1.0),
        ((0, 60, 60), 0.25, 0.75),  # c = (.5, 1)
        ((0, 60, 60 + math.degrees(math.acos(0.25)), 60 + math.degrees(math.acos(0.25))), 0.416667, 1.75 / 3),
    ],
)
def test_consistency(degrees: tuple[float, ...], expected: float, mean: float) -> None:
    """Oracle: closed form. C = 1 − mean c / max c of unit vectors at known angles."""
    rough, cosine, samples, undefined = pathway.consistency(*angles(*degrees))
    assert rough == pytest.approx(expected, rel=1e-5, abs=1e-9)
    assert cosine == pytest.approx(mean)
    assert (samples, undefined) == (1, 0)


def test_without_a_positive_cosine_there_is_no_consistency() -> None:
    """Oracle: planted fault. Opposite directions have a mean cosine of −1 and no C."""
    assert pathway.consistency(*angles(0, 180, 0)) == [0, pytest.approx(-1), 1, 1]


def test_dimension() -> None:
    """Oracle: closed form. Four experts of one's own: 4/2; all one-hot and alike: 4/5; even and alike: the same."""
    assert pathway.dimension(np.eye(4)) == pytest.approx(2)
    assert pathway.dimension(np.eye(4)[[1, 1, 1, 1]]) == pytest.approx(0.8)
    assert pathway.dimension(np.full((4, 8), 1 / 8)) == pytest.approx(0.8)
    assert math.isnan(pathway.dimension(np.array([[math.nan, 1.0]])))


# ---- the probe


class Gate(nn.Module):
    """A router with a weight of its own that gives away only the ``k`` weights and experts."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.weight, self.bias = how, nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Any:
        z = F.linear(x, self.weight, self.bias)
        weights, chosen = z.softmax(-1).topk(2)
        return {"scores": (z, weights, chosen), "probabilities": (weights, chosen, z.softmax(-1))}.get(
            self.how, (weights, chosen)
        )


class Layered(nn.Module):
    """Three layers of six experts over five tokens a sample, with dropout and batch normalisation."""

    def __init__(self, how: str, *, flat: bool = True) -> None:
        super().__init__()
        self.flat, self.first, self.norm = flat, nn.Linear(3, 8), nn.BatchNorm1d(8)
        self.gates = nn.ModuleList(Gate(how) for _ in range(3))
        self.experts = nn.ModuleList(nn.Linear(8, 6 * 8) for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.norm(self.first(x).flatten(0, 1)).view(*x.shape[:2], 8), 0.2, self.training)
        for gate, expert in zip(self.gates, self.experts, strict=True):
            weights, chosen, *_ = found = gate(x.flatten(0, 1) if self.flat else x)
            if found[0].shape[-1] == 6:
                weights, chosen = found[1:]
            weights, chosen = weights.view(*x.shape[:2], 2), chosen.view(*x.shape[:2], 2)
            each = expert(x).unflatten(-1, (6, 8))
            x = x + (each.gather(2, chosen.unsqueeze(-1).expand(-1, -1, -1, 8)) * weights.unsqueeze(-1)).sum(2)
        return self.head(x.mean(1))


def train(model: nn.Module, folder: Path, steps: int = 3, *probes: Pathways) -> tuple[monitor.Run, list[dict]]:
    """A few steps; the run, and the model's state before each update."""
    opt = torch.optim.SGD(model.parameters(), lr=0.3)
    states = []
    with monitor.attach(model, folder, probes=probes):
        for _ in range(steps):
            x, y = torch.randn(9, 5, 3), torch.randint(0, 4, (9,))
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            states.append({"x": x, **{k: v.clone() for k, v in model.state_dict().items()}})
            opt.step()
    found = monitor.open(folder)
    assert not found.warnings
    return found, states


def scores_of(model: Layered, x: Tensor) -> list[Tensor]:
    """What each gate makes of ``x``, ``(sample, token, expert)``."""
    z: list[Tensor] = []
    for gate in model.gates:
        gate.register_forward_hook(lambda m, args, out: z.append(out[0].detach().reshape(9, 5, 6)))
    with torch.no_grad():
        model(x)
    return z


@pytest.mark.parametrize("how", ["scores", "probabilities", "choices"])
@pytest.mark.parametrize("flat", [True, False])
def test_the_probe_sees_what_the_routers_do(how: str, flat: bool, tmp_path: Path) -> None:
    """Oracle: dense float64 reference. The first batch, in evaluation mode, on the parameters before the update."""
    torch.manual_seed(0)
    model = Layered(how, flat=flat)
    run, states = train(model, tmp_path / "run", 3, Pathways(every=1))
    before: list[Tensor] = []
    for step, state in enumerate(states):
        twin = Layered("scores", flat=flat).double().eval()
        x = states[0]["x"].double()
        twin.load_state_dict({k: v for k, v in state.items() if k != "x"})
        z = scores_of(twin, x)
        g = [s.softmax(-1).mean(1).numpy() for s in z]
        paths = pathway.symbols([pathway.experts_of(p, 0.7) for p in g])
        pairs = [(i, j) for i in range(9) for j in range(i)]
        apart = np.mean([naive(paths[i], paths[j]) / max(len(paths[i]), len(paths[j])) for i, j in pairs])
        assert run.series("pathway_distance.distance")[1][step] == pytest.approx(apart)
        assert run.series("pathway_distance.pairs")[1][step] == 36
        e = torch.stack([torch.from_numpy(p) @ state[f"gates.{i}.weight"].double() for i, p in enumerate(g)])
        c = F.cosine_similarity(e[:-1], e[1:], dim=-1)
        assert run.series("pathway_consistency.mean_cosine")[1][step] == pytest.approx(c.mean().item(), rel=1e-5)
        assert run.series("pathway_consistency.undefined")[1][step] == pytest.approx((c.amax(0) <= 0).double().mean())
        h = torch.from_numpy(g[1] @ g[1].T)
        d = torch.linalg.solve(h + h.diagonal().mean() * torch.eye(9), h).trace().item()
        assert run.series("routing_dimension.dimension", "gates.1")[1][step] == pytest.approx(d, rel=1e-5)
        chosen = [F.one_hot(s.reshape(45, 6).topk(2).indices, 6).sum(1) for s in z]
        if before:
            gone = [(1 - (a * b).sum() / 90).item() for a, b in zip(before, chosen, strict=True)]
            found = [run.series("pathway_churn.churn", f"gates.{i}")[1][step - 1] for i in range(3)]
            assert found == pytest.approx(gone, abs=1e-6)
        before = chosen
        if step == 0:
            written = pathway.written([pathway.experts_of(p, 0.7) for p in g])
            assert run.table("pathways", 0).column("pathway").to_pylist() == written
    assert run.series("pathway_churn.steps", "gates.0")[1].tolist() == [1, 1]


def test_a_model_without_routers_is_left_alone(tmp_path: Path) -> None:
    """Oracle: definition. Nothing is measured, nothing is said, and the probe given counts once beside the default."""
    trainings.seed()
    model = trainings.mlp()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    with monitor.attach(model, tmp_path / "run", probes=[Pathways(every=1)]):
        for x, y in trainings.batches(3):
            F.cross_entropy(model(x), y).backward()
            opt.step()
    run = monitor.open(tmp_path / "run")
    assert not [m for m in run.metrics() if m.startswith(("pathway", "routing"))]
    assert not [a for a in run.info["absent"] if "pathway" in a["what"]]


def test_by_default_within_a_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: definition. Without being asked for, pathways are looked at, after the first ten steps and not always."""
    monkeypatch.setattr(Pathways, "share", 0.3)  # of a second of training, which is all there is here
    torch.manual_seed(0)
    run, _ = train(Layered("scores"), tmp_path / "run", 60)
    steps = run.series("pathway_distance.distance")[0]
    assert 0 < len(steps) < 45 and steps[0] >= 10


def test_few_tables(tmp_path: Path) -> None:
    """Oracle: definition. Tables are written when the steps have grown by a half: eight in 30 steps."""
    torch.manual_seed(0)
    run, _ = train(Layered("scores"), tmp_path / "run", 30, Pathways(every=1))
    assert [step for _, _, step in run.tables()] == [0, 2, 3, 5, 8, 12, 18, 27]
    assert len(run.series("pathway_distance.distance")[0]) == 30


@pytest.mark.parametrize("client", moe.CLIENTS)
def test_unmodified_transformers(client: str, tmp_path: Path) -> None:
    """Oracle: dense float64 reference from the scores the model's own gates return in evaluation."""
    pytest.importorskip("transformers")
    model = moe.client(client)
    z: list[Tensor] = []
    hooks = [
        m.register_forward_hook(lambda m, args, out: None if m.training else z.append(out[0].detach()))
        for path, m in model.named_modules()
        if path.endswith(".gate")
    ]
    run = moe.train(model, tmp_path / "run", 2, probes=[Pathways(every=1)])
    assert len(hooks) == 2 and len(z) == 4  # two layers, two looks
    for step in range(2):
        g = [s.double().view(2, 16, 8).softmax(-1).mean(1).numpy() for s in z[2 * step : 2 * step + 2]]
        assert run.series("pathway_distance.distance")[1][step] == pytest.approx(pathway.distances(g, [2, 2])[0])
    assert run.series("pathway_consistency.samples")[1].tolist() == [2, 2]
    assert len(run.modules("routing_dimension.dimension")) == 2


def digest(client: str, watch: Any) -> str:
    """A training of one client, with whatever it leaves behind."""
    model = moe.client(client)
    trainings.seed()
    opt, found = torch.optim.AdamW(model.parameters(), lr=1e-3), trainings.Digest()
    watch(model)
    for _ in range(12):
        tokens = torch.randint(0, 64, (2, 16))
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        opt.step()
        opt.zero_grad()
        found.add(loss)
    return found.finish(model, opt)


@pytest.mark.parametrize("client", moe.CLIENTS)
def test_training_is_bitwise_the_same(client: str, tmp_path: Path) -> None:
    """Oracle: invariance. With the probe at every step, parameters, losses, states and generators are the same bits."""
    pytest.importorskip("transformers")
    plain = digest(client, lambda model: None)
    handles: list[monitor.Handle] = []

    def watch(model: nn.Module) -> None:
        handles.append(monitor.attach(model, tmp_path / "run", probes=[Pathways(every=1)]))

    assert digest(client, watch) == plain
    handles[0].close()
    run = monitor.open(tmp_path / "run")
    assert not run.warnings and len(run.series("pathway_distance.distance")[0]) == 12


def test_dropout_and_running_statistics_are_bitwise_the_same(tmp_path: Path) -> None:
    """Oracle: invariance. The same for dropout drawn from the global generator, and for buffers."""

    def end(*probes: Pathways) -> dict[str, Tensor]:
        trainings.seed()
        model = Layered("scores")
        if probes:
            train(model, tmp_path / "run", 12, *probes)
        else:
            opt = torch.optim.SGD(model.parameters(), lr=0.3)
            for _ in range(12):
                x, y = torch.randn(9, 5, 3), torch.randint(0, 4, (9,))
                opt.zero_grad()
                F.cross_entropy(model(x), y).backward()
                opt.step()
        assert model.training
        return {**model.state_dict(), "generator": torch.get_rng_state()}

    watched, plain = end(Pathways(every=1)), end()
    assert all(torch.equal(watched[k], plain[k]) for k in plain)
