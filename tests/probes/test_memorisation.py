"""Memorised samples: the rule on losses by hand, and the losses against the model's own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import monitor
from monitor.probes import Memorisation
from monitor.probes.memorisation import LOOKS, Memory
from tests.record import moe, trainings


def test_memorised_since() -> None:
    """Oracle: closed form. Losses 2, 1, .4, .42, .41 with ε = .5 are memorised since look 2; 2 … 1.6 never are."""
    memory = Memory(0.5, looks=3)
    looks = np.array([[2, 1, 0.4, 0.42, 0.41], [2, 1.9, 1.8, 1.7, 1.6]]).T
    known = [memory.look(step, losses) for step, losses in enumerate(looks)]
    assert known == [False, False, True, True, True]
    np.testing.assert_array_equal(memory.since, [2, np.nan])


def test_forgotten_and_unsteady() -> None:
    """Oracle: definition. Small but moving is not memorised; a loss that rises ends it; NaN never is."""
    memory = Memory(0.5, looks=3)
    moving = [0.4, 0.3, 0.2, 0.1, 0.09, 0.08]
    back = [0.1, 0.1, 0.1, 0.1, 0.6, 0.1]
    since = []
    for step, losses in enumerate(zip(moving, back, [math.nan] * 6, strict=True)):
        memory.look(10 * step, np.array(losses))
        since.append(memory.since.tolist())
    assert np.isnan(np.array(since)[:5, 0]).all() and since[5][0] == 30
    assert [s[1] for s in since[2:4]] == [0, 0] and math.isnan(since[4][1]) and math.isnan(since[5][1])
    assert all(math.isnan(s[2]) for s in since)


def record(model: nn.Module, loss: Any, batch: Any, folder: Path, steps: int, lr: float = 0.1) -> monitor.Run:
    """Train on one batch for ever."""
    opt = torch.optim.Adam(model.parameters(), lr=lr)
    with monitor.attach(model, folder, probes=[Memorisation(every=1)]):
        for _ in range(steps):
            opt.zero_grad()
            loss(model, batch).backward()
            opt.step()
    run = monitor.open(folder)
    assert not run.warnings
    return run


def test_a_probe_that_is_used_again_remembers_nothing(tmp_path: Path) -> None:
    """Oracle: invariance. The second run with one probe gives what it gives with a fresh one."""
    probe, seen = Memorisation(every=1), []
    for given in (probe, probe, Memorisation(every=1)):
        trainings.seed()
        model, x = nn.Linear(12, 5), torch.randn(8, 12)
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        with monitor.attach(model, tmp_path / f"{len(seen)}", probes=[given]):
            for _ in range(LOOKS + 2):
                opt.zero_grad()
                F.cross_entropy(model(x), torch.arange(8) % 5).backward()
                opt.step()
        run = monitor.open(tmp_path / f"{len(seen)}")
        looks = [(step, run.table(name, step).to_pydict()) for name, _, step in run.tables()]
        seen.append((looks, run.frame("memorisation").to_dict()))
    assert str(seen[0]) == str(seen[1]) == str(seen[2])


def test_one_batch_is_memorised(tmp_path: Path) -> None:
    """Oracle: dense float64 reference for the first look; after enough steps on one batch all of it is memorised."""
    trainings.seed()
    model = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 5))
    batch = next(trainings.batches(1, rows=20))
    x, y = batch
    with torch.no_grad():
        expected = F.cross_entropy(model.double().eval()(x.double()), y).item()
    model.float().train()
    smoothed = lambda m, b: F.cross_entropy(m(b[0]), b[1], label_smoothing=0.1)  # noqa: E731
    run = record(model, smoothed, batch, tmp_path / "run", 60, lr=0.02)
    steps, loss = run.series("memorisation.loss")
    assert loss[0] == pytest.approx(expected, rel=1e-5)
    assert steps[0] == 0
    assert run.series("memorisation.threshold")[1][0] == pytest.approx(0.15 * math.log(5))
    steps, fraction = run.series("memorisation.fraction")
    assert steps[0] == 4 and fraction[0] == 0 and fraction[-1] > 0.5
    began = run.series("memorisation.median_step")
    assert began[0][0] == steps[fraction > 0][0] and (began[1] < began[0]).all()
    table = run.table("memorisation", 41).to_pandas()
    assert len(table) == 20 and table["since"].notna().mean() == pytest.approx(fraction[steps == 41][0])
    assert table["loss"].mean() == pytest.approx(loss[41], rel=1e-5)


def test_sequences_and_padding(tmp_path: Path) -> None:
    """Oracle: dense float64 reference. Means over the positions of each sample that count."""
    trainings.seed()
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 16))
    tokens = torch.randint(0, 16, (6, 9))
    target = tokens.roll(-1, 1)
    target[:, -1] = -100
    target[2, 3:] = -100
    flat = lambda m, b: F.cross_entropy(m(b[0]).flatten(0, 1), b[1].flatten())  # noqa: E731
    logits = model(tokens).detach().double()
    each = F.cross_entropy(logits.transpose(1, 2), target, reduction="none")
    expected = each.sum(1) / (target != -100).sum(1)
    run = record(model, flat, (tokens, target), tmp_path / "run", 1)
    assert run.table("memorisation", 0).column("loss").to_pylist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_a_loss_without_classes_says_so(tmp_path: Path) -> None:
    """Oracle: planted fault. A squared error has no cross-entropy: absent with a reason, and training goes on."""
    trainings.seed()
    model = trainings.mlp()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    with monitor.attach(model, tmp_path / "run", probes=[Memorisation(every=1)]):
        for x, _ in trainings.batches(3):
            model(x).square().mean().backward()
            opt.step()
    run = monitor.open(tmp_path / "run")
    assert "memorisation.loss" not in run.refs()
    (why,) = [a["why"] for a in run.info["absent"] if a["what"] == "memorisation"]
    assert "no cross-entropy" in why


def test_a_language_model_of_transformers(tmp_path: Path) -> None:
    """Oracle: dense float64 reference from the logits of the model in evaluation, shifted by one; bitwise the same."""
    pytest.importorskip("transformers")

    def end(*probes: Memorisation) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        model = moe.client("mixtral")
        tokens, logits = torch.randint(0, 64, (2, 16)), torch.zeros(0)
        opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
        with torch.no_grad():
            logits = model.eval()(tokens).logits
        model.train()
        handle = monitor.attach(model, tmp_path / "run", probes=probes) if probes else None
        for _ in range(3):
            model(tokens, labels=tokens).loss.backward()
            opt.step()
            opt.zero_grad()
        if handle is not None:
            handle.close()
        return {**model.state_dict(), "generator": torch.get_rng_state()}, logits, tokens

    watched, logits, tokens = end(Memorisation(every=1))
    plain, _, _ = end()
    assert all(torch.equal(watched[k], plain[k]) for k in plain)
    each = F.cross_entropy(logits.double()[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)
    table = monitor.open(tmp_path / "run").table("memorisation", 0)
    assert table.column("loss").to_pylist() == pytest.approx(each.tolist(), rel=1e-5)
