"""Which examples have labels that contradict the others: found by what is in them, or by noted ids."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import monitor
from monitor.record.passes.example import Book, margins
from monitor.record.sites import example
from monitor.remedies import fingerprints


def test_margins() -> None:
    """Oracle: closed form. z_y minus the largest other; NaN where the row does not count."""
    z = torch.tensor([[3.0, 1, 2], [3, 1, 2], [0, 0, 0], [1, 2, 3]])
    found = margins(z, torch.tensor([0, 1, 2, -100]), -100)
    assert found[:3].tolist() == [1, -2, 0]
    assert found[3].isnan()


def test_the_book() -> None:
    """Oracle: closed form. Three examples of class 0 and one of class 1, whose mean margins are 1, 1, -1 and -2."""
    book = Book()
    labels = np.array([0, 0, 0, 1])
    for i in range(3):
        book.enter(["a", "b", "c", "d"], labels, np.array([i, 1, -1, -2.0]))
    assert book.statistics() is None
    book.enter(["d", "c", "b", "a"], labels[::-1], np.array([-2.0, -1, 1, 1]))
    n, visits, negative, earlier, whole = book.statistics() or [0.0] * 5
    assert (n, visits, negative, whole) == (4, 4, 0.5, 0.5)  # all of class 1, a third of class 0
    assert np.isnan(earlier)
    for _ in range(2):
        book.enter(["a", "b", "c", "d"], labels, np.array([1, 1, 99, -2.0]))
    assert book.statistics() == [4, 6, 0.25, 0.5, 1]
    table: dict[str, Any] = dict(book.table())
    assert table["example"] == ["d", "a", "b", "c"]
    np.testing.assert_allclose(table["margin"], [-2, 1, 1, (99 * 2 - 4) / 6])
    assert book.changed == 0
    book.enter(["a"], np.array([7]), np.array([1.0]))
    assert book.changed == 1


def digits(wrong: float, n: int = 600) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, labels, and which of them were replaced."""
    images, labels = (torch.tensor(a) for a in load_digits(return_X_y=True))
    g = torch.Generator().manual_seed(0)
    x, y = (images / 16).float()[:n], labels[:n].clone()
    replaced = torch.rand(n, generator=g) < wrong
    y[replaced] = (y[replaced] + torch.randint(1, 10, (int(replaced.sum()),), generator=g)) % 10
    return x, y, replaced


def train(folder: Path, x: Tensor, y: Tensor, epochs: int, ids: bool = False, noise: float = 0.0) -> monitor.Run:
    """The net learns its digits in batches of 50, in an order of its own each time."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    with monitor.attach(model, folder) as handle:
        for _ in range(epochs):
            for rows in torch.randperm(len(x)).split(50):
                if ids:
                    handle.note(rows)
                optimizer.zero_grad()
                F.cross_entropy(model(x[rows] + noise * torch.randn(len(rows), 64)), y[rows]).backward()
                optimizer.step()
    return monitor.open(folder)


def examples(run: monitor.Run) -> pa.Table:
    """The last table of all examples."""
    step = max(step for name, _, step in run.tables() if name == "examples")
    return run.table("examples", step)


def test_wrong_labels_are_found(tmp_path: Path) -> None:
    """Oracle: planted fault. A tenth of the labels replaced: nine in ten of as many with the least margin are those."""
    x, y, replaced = digits(0.1)
    run = train(tmp_path / "run", x, y, 60)
    assert [f.rule for f in run.findings()] == ["suspected_label_errors"]
    table = examples(run)
    count = int(replaced.sum())
    worst = np.isin(fingerprints(x).numpy(), table["example"].to_numpy()[:count])
    assert worst.sum() == count
    assert replaced.numpy()[worst].mean() > 0.85
    shown = table.to_pandas().set_index("example")["label"]
    assert shown.loc[fingerprints(x).numpy()].tolist() == y.tolist()


def test_without_wrong_labels(tmp_path: Path) -> None:
    """Oracle: planted fault, absent. The rule had what it needs to judge."""
    run = train(tmp_path / "run", *digits(0.0)[:2], 60)
    assert run.findings() == []
    assert not np.isnan(run.series("example_margin.earlier")[1]).all()


def test_noted_ids(tmp_path: Path) -> None:
    """Oracle: golden. Under augmentation ids tell examples apart, and each epoch is a visit."""
    x, y, replaced = digits(0.1)
    run = train(tmp_path / "run", x, y, 26, ids=True, noise=0.1)
    table = examples(run)
    assert sorted(table["example"].to_pylist()) == list(range(600))
    count = int(replaced.sum())
    assert replaced.numpy()[table["example"].to_numpy()[:count]].mean() > 0.85
    assert run.series("example_margin.visits")[1].max() == pytest.approx(25, abs=1)


def test_what_never_comes_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: planted fault. Augmented inputs are given up, and the run says what to do."""
    monkeypatch.setattr(example, "_DISTINCT", 500)
    run = train(tmp_path / "run", *digits(0.0)[:2], 20, noise=0.1)
    assert "example_margin" not in run.metrics()
    assert [a["why"] for a in run.info["absent"] if a["what"] == "example_margin"] == [
        "no input comes twice, as under augmentation: handle.note(ids) tells examples apart"
    ]


def test_labels_that_are_none(tmp_path: Path) -> None:
    """Oracle: planted fault. Places in the batch as classes, as in contrastive learning, are not labels of examples."""
    x = digits(0.0)[0][:100]
    torch.manual_seed(0)
    model = nn.Linear(64, 50)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with monitor.attach(model, tmp_path / "run"):
        for _ in range(120):
            rows = torch.randperm(100)[:50]
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), torch.arange(50)).backward()
            optimizer.step()
    run = monitor.open(tmp_path / "run")
    assert "example_margin" not in run.metrics()
    assert "the label of an example changes from one visit to the next" in {a["why"] for a in run.info["absent"]}


@pytest.mark.slow
def test_training_without_them(tmp_path: Path) -> None:
    """Oracle: definition. A tenth of 1,200 labels replaced: the tenth with the least margin left out, held-out digits.

    The means of 5 seeds are told by the README and the rule: 0.893 with all, 0.973 without those, 0.978 with clean
    labels; 0.92 and 0.91 of those left out, by an early and the last table, had wrong labels.
    """
    images, labels = (torch.tensor(a) for a in load_digits(return_X_y=True))
    images = (images / 16).float()

    def fit(x: Tensor, y: Tensor, seed: int, rest: Tensor, folder: Path | None = None) -> float:
        torch.manual_seed(seed)
        layers = (nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
        model = nn.Sequential(*layers)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        with monitor.attach(model, folder) if folder else nullcontext():
            for _ in range(60):
                for rows in torch.randperm(len(x)).split(50):
                    optimizer.zero_grad()
                    F.cross_entropy(model(x[rows]), y[rows]).backward()
                    optimizer.step()
        return float((model(images[rest]).argmax(1) == labels[rest]).float().mean())

    found = []
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(images), generator=g)
        some, rest = order[:1200], order[1200:]
        x, y = images[some], labels[some].clone()
        replaced = torch.rand(1200, generator=g) < 0.1
        y[replaced] = (y[replaced] + torch.randint(1, 10, (int(replaced.sum()),), generator=g)) % 10
        folder = tmp_path / str(seed)
        noisy = fit(x, y, seed, rest, folder)
        run = monitor.open(folder)
        assert "suspected_label_errors" in {f.rule for f in run.findings()}
        worst = torch.from_numpy(np.isin(fingerprints(x).numpy(), examples(run)["example"].to_numpy()[:120]))
        wrong = float(replaced[worst].float().mean())
        found.append([noisy, wrong, fit(x[~worst], y[~worst], seed, rest), fit(x, labels[some], seed, rest)])
    noisy, wrong, without, clean = np.mean(found, axis=0)
    assert noisy < 0.92 < 0.96 < without < clean + 0.005
    assert wrong > 0.85
