"""The Grokking page, without a browser: on a run that grokked, one that logged nothing, one with probes alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from streamlit.testing.v1 import AppTest
from torch import nn

import monitor
from monitor.diagnosis.transition import CAVEAT
from monitor.probes import EmbeddingGini
from monitor_dashboard import figures, sampling
from monitor_dashboard.figures import Band, Panel
from monitor_dashboard.page import grokking
from monitor_dashboard.theme import LIGHT
from tests.dashboard.kit import SAMPLES, charts, said


@pytest.fixture
def show(show_page: Callable[..., AppTest]) -> Callable[..., AppTest]:
    """Runs the page on a run, with an address."""
    return partial(show_page, "Grokking")


def chart(app: AppTest) -> dict[str, Any]:
    (found,) = charts(app)
    return found


def test_a_run_that_grokked(show) -> None:
    """Oracle: golden. The recorded run's phases are said and drawn, over accuracies, losses and the probes' columns."""
    app = show(SAMPLES / "grokking_p41")
    text = said(app)
    assert "Grokking" in text
    assert "generalised at step 2," in text
    assert "times as late" in text
    found = chart(app)
    names = [a["text"] for a in found["layout"]["annotations"]]
    for name in ("memorised", "generalising", "<b>accuracy</b>", "<b>restricted_loss</b>", "<b>gini</b>"):
        assert name in names
    assert found["layout"]["xaxis"]["range"][0] < 0
    assert "Not recorded: odd_fraction" in text


def test_logarithmic_steps_are_in_the_address(show) -> None:
    """Oracle: definition. The axis is logarithmic and begins at step 1."""
    found = chart(show(SAMPLES / "grokking_p41", logsteps="true"))
    assert found["layout"]["xaxis"]["type"] == "log"
    assert found["layout"]["xaxis"]["range"][0] == 0


def test_a_probe_alone_is_drawn(show) -> None:
    """Oracle: golden. XOR clusters: the held-out accuracy follows at once, and the odd fraction is there."""
    text = said(show(SAMPLES / "xor_clusters"))
    assert grokking.WORDS["normal"] in text
    assert "odd_fraction" not in text


def test_gradient_along_the_weights_and_growth_are_drawn(show, tmp_path: Path) -> None:
    """Oracle: definition. A strip with the whole and each tensor; the distance's caption has the fit over ln t."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    x, y = torch.randn(20, 6), torch.randint(0, 3, (20,))
    with monitor.attach(model, tmp_path / "run") as recording:
        for step in range(60):
            if step % 10 == 0:
                recording.log(val_acc=0.3)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    app = show(tmp_path / "run")
    text = said(app)
    missing = text.partition("Not recorded: ")[2]
    assert "nlm_cos" not in missing
    drawn = json.dumps(chart(app))
    for words in ("<b>nlm_cos</b>", "Gradient along the weights", "ln t, R\\u00b2 0.", "0.weight", "2.weight"):
        assert words in drawn


def test_without_held_out_data_there_is_a_hint(show, tmp_path: Path) -> None:
    """Oracle: definition. What the markers say, what they lack, and always that it is indirect; no phases are drawn."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(12, 8), nn.Flatten(), nn.Linear(16, 12, bias=False))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    x = torch.randint(0, 12, (8, 2))
    with monitor.attach(model, tmp_path / "run", probes=[EmbeddingGini(every=2)]):
        for _ in range(120):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), torch.arange(8)).backward()
            optimizer.step()
    app = show(tmp_path / "run")
    text = said(app)
    assert "the phases are not known" in text
    assert f"{CAVEAT[0].upper()}{CAVEAT[1:]}; learned at step" in text
    assert "At the last evaluation: gini " in text
    assert "generalised at step" not in text


def test_nothing_of_it_is_one_line(show, scripted, tmp_path: Path) -> None:
    """Oracle: definition. A run without held-out data or probes gets one line that says what to do, and no chart."""
    app = show(scripted(tmp_path / "plain").train(30).finish())
    assert said(app).count("mon-line") == 1
    assert grokking.NOTHING.partition(",")[0] in said(app)
    assert not app.get("plotly_chart")


def stretches(figure: Any) -> list[tuple[int, int]]:
    return [(s.x0, s.x1) for s in figure.layout.shapes if s.type == "rect"]


def test_bands_follow_one_another() -> None:
    """Oracle: closed form. Each band begins where the one before ends; a name without room is left out."""
    strip = Panel("loss", "loss", "", {"loss": sampling.line(np.array([1, 2]), np.ones(2))}, False, 90)
    bands = [Band("a", 0, 9), Band("<b>long</b>", 10, 499), Band("generalised", 500, 501), Band("end", 502, 999)]
    figure: Any = figures.lines([strip], [], (0, 999), LIGHT, bands=bands)
    assert stretches(figure) == [(0, 10), (10, 500), (500, 502), (502, 1000)]
    names = [a.text for a in figure.layout.annotations]
    assert "generalised" not in names
    assert "end" in names
    assert "&lt;b&gt;long&lt;/b&gt;" in names
    # looked at closer, on either scale: what is seen of them, named where that begins
    closer: Any = figures.lines([strip], [], (100, 501), LIGHT, bands=bands)
    assert stretches(closer) == [(100, 500), (500, 502)]
    assert [a.x for a in closer.layout.annotations if "long" in a.text] == [100]
    early: Any = figures.lines([strip], [], (0, 999), LIGHT, bands=bands, log_steps=True)
    assert stretches(early)[0] == (1, 10)
    assert list(early.layout.xaxis.range) == [0, np.log10(999)]


def test_chosen_steps_are_shown(show) -> None:
    """Oracle: invariance. The steps of the address are those of the chart."""
    low, high = chart(show(SAMPLES / "grokking_p41", from_="1000", to="2000"))["layout"]["xaxis"]["range"]
    assert 990 < low <= 1000 and 2000 <= high < 2010
