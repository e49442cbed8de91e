"""Alignment of gradients between sources: recorded right, conflicts found, training as it was."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import monitor
from monitor.errors import UsageError
from monitor.probes import Sources
from monitor.probes.sources import aligned
from tests.record import trainings


def test_closed_form() -> None:
    """Oracle: closed form. (3, 4) and (0, −2): cosine −.8, norms 5 and 2; a gradient of zero has none."""
    assert aligned(torch.tensor([3.0, 4.0]), torch.tensor([0.0, -2.0])).tolist() == pytest.approx([-0.8, 5, 2])
    assert aligned(torch.zeros(2), torch.ones(2))[0].isnan()


def test_naive_gradients(tmp_path: Path) -> None:
    """Oracle: naive transcription. One backward for each source, by hand, on a copy with dropout off."""
    trainings.seed()
    data = {name: (torch.randn(20, 12), torch.randint(0, 5, (20,))) for name in ("code", "prose", "tables")}
    model, twin = trainings.mlp(), trainings.mlp().eval()
    losses: dict[str, Any] = {name: (F.cross_entropy, batch) for name, batch in data.items()}
    losses["tables"] = lambda: F.cross_entropy(model(data["tables"][0]), data["tables"][1])
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with monitor.attach(model, tmp_path / "run", probes=[Sources(losses, parameters="3", every=2)]):
        for x, y in trainings.batches(3):
            twin.load_state_dict(model.state_dict())  # in the end as before the last update
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()
    by_hand = {}
    for name, (x, y) in data.items():
        found = torch.autograd.grad(F.cross_entropy(twin(x), y), list(twin[3].parameters()))
        by_hand[name] = torch.cat([g.flatten() for g in found])
    run = monitor.open(tmp_path / "run")
    assert not run.warnings
    for a, b in combinations(data, 2):
        steps, values = run.series("gradient_alignment.cosine", f"{a}|{b}")
        assert steps.tolist() == [0, 2]
        cosine = float(F.cosine_similarity(by_hand[a], by_hand[b], dim=0))
        assert values[1] == pytest.approx(cosine, rel=1e-5, abs=1e-6)
        norms = [run.series(f"gradient_alignment.{c}", f"{a}|{b}")[1][1] for c in ("norm", "other_norm")]
        assert norms == pytest.approx([float(by_hand[a].norm()), float(by_hand[b].norm())], rel=1e-5)


def test_training_is_bit_for_bit_the_same(tmp_path: Path) -> None:
    """Oracle: invariance. Hash of parameters, optimizer state, losses and all random generators."""
    batch = torch.randn(20, 12), torch.randint(0, 5, (20,))
    control = trainings.plain(lambda _: None)
    handles = []

    def watch(model: nn.Module) -> None:
        sources = Sources({"a": (F.cross_entropy, batch), "b": (F.cross_entropy, batch)}, every=5)
        handles.append(monitor.attach(model, tmp_path / "run", probes=[sources]))

    assert trainings.plain(watch) == control
    handles[0].close()
    cosine = monitor.open(tmp_path / "run").series("gradient_alignment.cosine", "a|b")[1]
    assert cosine.tolist() == pytest.approx([1.0] * 6)


@pytest.mark.parametrize("wrong", [False, True])
def test_a_conflict_is_found(wrong: bool, tmp_path: Path) -> None:
    """Oracle: planted fault. Two halves of digits agree; if all labels of one are moved by one, they do not."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    if wrong:
        y[900:] = (y[900:] + 1) % 10
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    opt = torch.optim.Adam(model.parameters(), lr=3e-3)
    sources = {"first": (F.cross_entropy, (x[:200], y[:200])), "second": (F.cross_entropy, (x[-200:], y[-200:]))}
    with monitor.attach(model, tmp_path / "run", probes=[Sources(sources, every=20)]):
        for _ in range(400):
            i = torch.randint(0, len(x), (64,))
            opt.zero_grad()
            F.cross_entropy(model(x[i]), y[i]).backward()
            opt.step()
    found = [(f.rule, f.module) for f in monitor.open(tmp_path / "run").findings() if f.rule == "gradient_conflict"]
    assert found == ([("gradient_conflict", "first|second")] if wrong else [])


@pytest.mark.parametrize("names", [["a"], ["a", "b|c"]])
def test_wrong_sources_are_named(names: list[str]) -> None:
    """Oracle: planted fault."""
    with pytest.raises(UsageError, match="two or more"):
        Sources({name: lambda: torch.zeros(()) for name in names})
