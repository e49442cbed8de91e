"""The Curvature page, without a browser: on a run that recorded it, one that could not, one that did not ask."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from streamlit.testing.v1 import AppTest

import monitor
from monitor_dashboard import figures
from monitor_dashboard.figures import Spectra
from monitor_dashboard.page import load_pages
from monitor_dashboard.theme import DARK
from tests.dashboard.kit import charts, said


@pytest.fixture
def show(show_page: Callable[..., AppTest]) -> Callable[..., AppTest]:
    """Runs the page on a run, with an address."""
    return partial(show_page, "Curvature")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A short training whose curvature was recorded, by optimizer."""
    made: dict[str, Path] = {}

    def run(optimizer: str) -> Path:
        if optimizer not in made:
            folder = made[optimizer] = tmp_path_factory.mktemp("runs") / optimizer
            torch.manual_seed(0)
            model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
            opt: Any = getattr(torch.optim, optimizer)(model.parameters(), lr=0.01)
            x, y = torch.randn(32, 6), torch.randint(0, 3, (32,))
            curvature = monitor.Curvature(every=4, full=2, blocks=True, landscape=0.5)
            with monitor.attach(model, folder, curvature=curvature):
                for _ in range(13):
                    opt.zero_grad()
                    torch.nn.functional.cross_entropy(model(x), y).backward()
                    opt.step()
        return made[optimizer]

    return run


def titles(figure: dict[str, Any]) -> list[str]:
    return [a["text"] for a in figure["layout"]["annotations"] if a["text"].startswith("<b>")]


@pytest.mark.parametrize(
    ("optimizer", "first"), [("SGD", ["<b>sharpness</b>"]), ("Adam", ["<b>sharpness</b>", "<b>preconditioned</b>"])]
)
def test_what_was_recorded_is_drawn(optimizer: str, first: list[str], recorded, show) -> None:
    """Oracle: definition. A strip for each measure, one threshold, the nodes of the tables."""
    path = recorded(optimizer)
    app = show(path)
    run = monitor.open(path)
    text = said(app)
    assert f"sharpness {run.series('sharpness.value')[1][-1]:.4g}" in text
    assert "batches of 32" in text
    assert "half of the pull up" in text
    strips, nodes, around, blocks = charts(app)
    found = titles(strips)
    assert found[: len(first)] == first
    assert {"<b>edge_of_stability</b>", "<b>learning rate</b>", "<b>hessian_trace</b>"} <= set(found)
    lines = [a["text"].split("  ")[0] for a in strips["layout"]["annotations"]]
    assert lines.count("threshold") == 1
    stored = [run.table(name, step, attempt) for name, attempt, step in run.tables() if name == "spectral_density"]
    assert len(stored) == 2
    shares, points = nodes["data"]
    np.testing.assert_allclose(np.nansum(10.0 ** _matrix(shares["z"]), axis=0), 1, rtol=1e-3)
    assert len(points["customdata"]) == sum(t.num_rows for t in stored)
    step = max(step for name, _, step in run.tables() if name == "landscape")
    table = run.table("landscape", step)
    losses = table.column("loss").to_numpy().reshape(11, 11)
    np.testing.assert_allclose(_matrix(around["data"][0]["z"]), losses.T, rtol=1e-6)
    assert len(blocks["data"]) == 2 + 2  # two maps, and a row to hover for each of two blocks


def test_nothing_recorded_is_one_line(scripted, show, tmp_path: Path) -> None:
    """Oracle: definition. How to get it, or why it could not be had."""
    path = scripted(tmp_path / "a").train(30).finish()
    app = show(path)
    assert said(app).count("<div") == 1
    assert "curvature=" in said(app)
    assert not charts(app)
    info = json.loads((path / "run.json").read_text())
    info["absent"] = [{"what": "curvature", "why": "<b>no tape"}]
    (path / "run.json").write_text(json.dumps(info))
    text = said(show(path))
    assert "&lt;b&gt;no tape" in text


def test_a_damaged_or_foreign_table_is_left_out(recorded, show, tmp_path: Path) -> None:
    """Oracle: planted fault. The other densities are drawn."""
    path = tmp_path / "copy"
    shutil.copytree(recorded("SGD"), path)
    tables = sorted((path / "rank0" / "tables").glob("spectral_density-*"))
    tables[0].write_bytes(tables[0].read_bytes()[:-40])
    (latest,) = sorted((path / "rank0" / "tables").glob("landscape-*"))[-1:]
    latest.write_bytes(b"no table")
    _, nodes, _ = charts(show(path))
    assert set(_numbers(nodes["data"][1]["x"])) == {8.0}


def _numbers(packed: Any) -> list[float]:
    """Plotly packs arrays as base64."""
    if isinstance(packed, dict):
        import base64

        return np.frombuffer(base64.b64decode(packed["bdata"]), dtype=packed["dtype"]).tolist()
    return list(packed)


def _matrix(packed: Any) -> np.ndarray[Any, Any]:
    return np.array(_numbers(packed)).reshape([int(n) for n in packed["shape"].split(",")])


@pytest.mark.parametrize("nodes", [[0.0], [-3.0, -1.0], [1e-30, 1e30], [-2.0, 0.0, 50.0]])
def test_any_nodes_have_a_place(nodes: list[float]) -> None:
    """Oracle: closed form. Finite and ordered as the nodes are, labels among them."""
    n = len(nodes)
    found = Spectra(np.zeros(n), np.array(nodes), np.full(n, 1 / n))
    figure: Any = figures.spectra(found, "caption", "unit", (0, 1), DARK)
    y = np.asarray(figure.data[1].y, dtype=float)
    low, high = figure.layout.yaxis.range
    assert np.isfinite(y).all()
    assert (np.diff(y) > 0).all() or n == 1
    assert low < y.min()
    assert y.max() < high


def test_the_page_is_found() -> None:
    """Oracle: definition."""
    assert "Curvature" in [p.title for p in load_pages()]
