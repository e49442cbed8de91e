"""The Compare page: what `monitor compare` says, in the browser; names are data; one run is one line."""

from __future__ import annotations

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
from monitor.diagnosis.comparison import HOLD, band, noise_band, parting
from monitor.store.run import open_run
from monitor_dashboard import data, figures, sampling
from monitor_dashboard.figures import Envelope, Mark, Panel
from monitor_dashboard.keys import Key
from monitor_dashboard.theme import DARK, LIGHT
from tests.dashboard.kit import SAMPLES, charts, said

EVIL = "r<img src=http:@192.0.2.1@x>[b]:material@home:\x1b[31m%{x}"


@pytest.fixture
def show(show_page: Callable[..., AppTest]) -> Callable[..., AppTest]:
    """Runs the page on a run, with an address."""
    return partial(show_page, "Compare")


def test_two_runs_that_part(scripted, show, tmp_path: Path) -> None:
    """Oracle: planted fault (a spike at step 200 of one of two equal runs), and what `monitor compare` computes."""
    scripted(tmp_path / "good").train(300).finish()
    scripted(tmp_path / "bad", spike=200).train(300).finish()
    app = show(tmp_path, run="good")
    text = said(app)
    p = parting(open_run(tmp_path / "good"), open_run(tmp_path / "bad"))
    assert p.identical_until == 199
    assert f"identical until step 199 ({p.series:,} series, steps 0 to 299)" in text
    assert "**bad**  identical until 199" in text
    assert "step 200" in text
    assert "<b>Healthy</b></span>" in text
    assert "<b>Warning</b></span> step 200" in text
    (figure,) = charts(app)
    drawn = [t for t in figure["data"] if t["mode"] == "lines" and "hovertemplate" in t]
    assert ["good" in t["hovertemplate"] for t in drawn] == [True, False]
    assert any(t.get("fill") == "toself" for t in figure["data"])  # the noise band


def test_a_series_is_chosen_by_address_and_button(scripted, show, tmp_path: Path) -> None:
    """Oracle: invariance. A link shows the same series; the button of a parting shows that one."""
    scripted(tmp_path / "good").train(300).finish()
    scripted(tmp_path / "bad", nan=250).train(300).finish()
    app = show(tmp_path, run="good", series="grad_norm.norm", of="blocks.1.mlp.weight")
    assert app.selectbox(key=Key.SERIES).value == "grad_norm.norm"
    assert app.selectbox(key=Key.SERIES_OF).value == "blocks.1.mlp.weight"
    assert "parts at step 250" in said(app)
    app.button(key=f"{Key.COMPARED}-1-0").click().run()
    assert not app.exception
    assert app.selectbox(key=Key.SERIES_OF).value == "blocks.0.mlp.weight"


def test_a_run_that_leaves_the_band_is_marked(show, tmp_path: Path) -> None:
    """Oracle: golden (two sample runs). A ring where the loss parts, at the step and value that were computed."""
    for name in ("moe_digits", "moe_digits_no_aux"):
        shutil.copytree(SAMPLES / name, tmp_path / name)
    app = show(tmp_path, run="moe_digits")
    p = parting(open_run(tmp_path / "moe_digits"), open_run(tmp_path / "moe_digits_no_aux"))
    (d,) = [d for d in p.later if d.ref == "loss.value"]
    ring = [t for t in charts(app)[0]["data"] if t.get("marker", {}).get("symbol") == "circle"]
    assert [(t["x"], t["y"]) for t in ring] == [([d.step], [d.value])]
    assert f"step {d.step:,} · loss.value" in said(app)
    assert "sample_runs/moe_digits_no_aux.py" in said(app)


@pytest.mark.parametrize("others", [0, 1])
def test_too_few_runs_are_one_line(others: int, scripted, show, tmp_path: Path) -> None:
    """Oracle: definition. One run alone, and one beside an unreadable one."""
    scripted(tmp_path / "only").train(30).finish()
    if others:
        shutil.copytree(tmp_path / "only", tmp_path / "broken")
        (tmp_path / "broken" / "run.json").write_text("{")
    text = said(show(tmp_path, run="only"))
    assert text.count("mon-line") == 1
    assert ("needs two or more runs" in text) == (not others)
    assert ("broken" in text) == bool(others)


def test_nothing_in_common_and_no_steps(scripted, show, tmp_path: Path) -> None:
    """Oracle: planted fault, absent. A run without a step beside one, and one that only begins."""
    scripted(tmp_path / "full").train(60).finish()
    empty = scripted(tmp_path / "empty")
    for name in ("full", "empty"):
        text = said(show(tmp_path, run=name))
        assert "nothing in common" in text
        assert "No series was recorded in this run and in another one." in text
    empty.writer.close("interrupted")


def test_hostile_names_are_shown_as_text(scripted, show, tmp_path: Path) -> None:
    """Oracle: planted fault. Markup, directives, escapes and templates in names of runs and modules."""
    modules = ("a.weight", EVIL.replace("@", "/"))
    scripted(tmp_path / "good", modules=modules).train(120).finish()
    scripted(tmp_path / EVIL, modules=modules, nan=60).train(120).finish()
    app = show(tmp_path, run="good", series="grad_norm.norm", of=modules[1])
    labels = "".join(e.label for e in (*app.expander, *app.button))  # read as Markdown
    drawn = "".join(h.body for h in app.html) + "".join(c.proto.spec for c in app.get("plotly_chart"))
    assert labels.count(":") == labels.count(":\N{WORD JOINER}") > 0
    assert "<img" not in drawn
    assert "\x1b" not in said(app) + labels + drawn + "".join(app.multiselect(key=Key.AGAINST).options)
    assert "%{x}" not in "".join(str(t.get("hovertemplate")) for f in charts(app) for t in f["data"])


def test_a_sweep(show, tmp_path: Path) -> None:
    """Oracle: invariance. Three rates: the sensitivity that `compare` gives, over a logarithmic axis."""
    for lr in (1e-3, 1e-2, 1e-1):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        x, y = torch.randn(16, 4), torch.randint(0, 3, (16,))
        with monitor.attach(model, tmp_path / f"lr{lr:g}"):
            for _ in range(30):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
    app = show(tmp_path)
    assert "best learning rate 0.1" in said(app)
    figure = charts(app)[-1]
    assert figure["layout"]["xaxis"]["type"] == "log"
    (curve,) = figure["data"]
    assert curve["x"] == [1e-3, 1e-2, 1e-1]
    assert list(np.diff(curve["y"]) < 0) == [True, True]


def test_noise_band_is_the_one_that_judges() -> None:
    """Oracle: naive transcription. The band of the recorded values; nothing for a series too short to judge."""
    run = open_run(SAMPLES / "moe_digits")
    steps, low, high = noise_band(run, "loss.value", "")
    at, values = run.series("loss.value")
    np.testing.assert_array_equal(steps, at)
    expected = band(values[None], np.ones((1, len(values)), bool), log=True)
    np.testing.assert_array_equal([low, high], [e[0] for e in expected])
    some = next(r for r in run.refs() if 0 < len(run.series(r, run.modules(r)[0])[0]) < HOLD)
    assert len(noise_band(run, some, run.modules(some)[0])[0]) == 0


def test_a_wide_band_does_not_flatten_the_lines() -> None:
    """Oracle: closed form. The scale reaches at most a quarter of the lines' own beyond them."""
    line = sampling.line(np.arange(3), np.array([0.0, 1.0, 0.5]))
    wide = Envelope(sampling.line(np.arange(3), np.full(3, -99.0)), sampling.line(np.arange(3), np.full(3, 1.1)))
    strip = Panel("a", "a", "", {"r": line}, False, 200, wide, (Mark("r", 1, 1.0, "<b>here"),))
    figure: Any = figures.lines([strip], [], (0, 2), LIGHT)
    low, high = figure.layout.yaxis.range
    assert low == pytest.approx(-0.06 - 0.25 * 1.12)
    assert 1.1 < high < 8
    assert "&lt;b&gt;here" in figure.data[-1].hovertemplate


def test_every_run_has_its_own_colour() -> None:
    """Oracle: definition. Eight runs at most are drawn, in colours that differ."""
    for palette in (LIGHT, DARK):
        assert len(set(palette.lines)) == 8


def test_a_live_run_is_laid_over_again_only_when_it_has_grown(scripted, tmp_path: Path) -> None:
    """Oracle: definition. A tenth more steps, or its end, makes a comparison anew; a step or two does not."""
    run = scripted(tmp_path / "a").train(1000)
    before = data.mark(data.view(run.path))
    run.train(2)
    assert data.mark(data.view(run.path)) == before
    run.train(150)
    later = data.mark(data.view(run.path))
    assert later != before
    run.finish()
    assert data.mark(data.view(run.path)) != later


def test_a_run_that_begins_does_not_change_what_is_compared(scripted, show, tmp_path: Path) -> None:
    """Oracle: invariance. The choice stays, made or not; a reference that was among the others is no longer one."""
    for name in ("a", "b", "c"):
        scripted(tmp_path / name).train(30).finish()
    app = show(tmp_path, run="a")
    assert sorted(app.multiselect(key=Key.AGAINST).value) == ["b", "c"]
    scripted(tmp_path / "d").train(30).finish()
    data.list_runs.clear()
    app.run()
    assert not app.exception
    assert sorted(app.multiselect(key=Key.AGAINST).value) == ["b", "c"]
    app.multiselect(key=Key.AGAINST).set_value(["d"]).run()
    scripted(tmp_path / "e").train(30).finish()
    data.list_runs.clear()
    app.run()
    assert app.multiselect(key=Key.AGAINST).value == ["d"]
    assert not app.exception


def test_what_is_far_apart_between_runs_is_on_a_log_scale(show) -> None:
    """Oracle: golden (sample runs). Each has one condition number, and they span four orders of magnitude."""
    app = show(SAMPLES / "double_descent", series="jacobian_spectrum.condition")
    assert charts(app)[0]["layout"]["yaxis"]["type"] == "log"
