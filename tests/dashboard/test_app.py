"""The page's logic, without a browser: what is said, what the address means, what a broken folder shows."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streamlit.testing.v1 import AppTest

import monitor_dashboard
from monitor.store.parts import Points
from monitor.store.run import Run, open_run
from monitor_dashboard import data, markup, panels
from monitor_dashboard.keys import Key
from monitor_dashboard.page import load_pages
from tests.dashboard.kit import SAMPLES, charts, said

APP = Path(monitor_dashboard.__file__).parent / "app.py"
EVIL = "blocks.<img src=http://192.0.2.1/x>.:material/home:"


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch) -> Callable[..., AppTest]:
    """Runs the script on a folder, with an address."""

    def run(folder: Path, **address: str) -> AppTest:
        monkeypatch.setenv(data.RUNS_VARIABLE, str(folder))
        app = AppTest.from_file(str(APP), default_timeout=30)
        for name, value in address.items():
            app.query_params[name.rstrip("_")] = value
        return app.run()

    return run


def test_page_of_a_sick_run(scripted, show, tmp_path: Path) -> None:
    """Oracle: planted fault (a loss spike at step 200)."""
    scripted(tmp_path / "sick", spike=200).train(300).finish()
    app = show(tmp_path)
    text = said(app)
    assert 'class="mon-verdict level-' in text
    assert "loss" in app.expander[0].label.lower()
    assert "200" in text
    assert "What to do" in text
    assert "1.2%" in text  # the overhead, as it was measured
    figures = charts(app)
    assert len(figures) == 3
    pins = [t for t in figures[0]["data"] if t.get("yaxis") == "y100"]
    assert any("1" in t.get("text", []) for t in pins)
    assert len(figures[1]["data"]) == 2 + 8  # two maps, and a row to click per tensor
    assert app.selectbox(key=Key.METRIC).value == "grad_norm"
    assert {"grad_norm", "update_ratio", "param_norm"} <= set(app.selectbox(key=Key.METRIC).options)


def test_what_is_remarkable_is_told(show) -> None:
    """Oracle: golden. The way of a run that grokked stands below its verdict, as in `monitor inspect`."""
    text = said(show(SAMPLES / "grokking_p41"))
    assert "training data learned at step" in text


def test_many_incidents_do_not_drown_the_page(scripted, show, tmp_path: Path) -> None:
    """Oracle: planted faults (26 spikes). The worst have a number and a place, the rest a line each; none is hidden."""
    run = scripted(tmp_path / "a")
    for _ in range(26):
        run.spike = run.train(149).step
        run.train(1)
    app = show(run.finish())
    count = int(said(app).partition("Incidents · ")[2].partition("<")[0])
    assert count > panels.TOLD
    (rest,) = (e for e in app.expander if e.label.endswith(" more"))
    assert rest.label == f"{count - panels.TOLD} more"
    assert rest.html[0].body.count("<tr>") == count - panels.TOLD
    pins = [t for t in charts(app)[0]["data"] if t.get("yaxis") == "y100"]
    numbered = [label for t in pins for label in t.get("text", []) if label]
    assert numbered == [str(i + 1) for i in range(panels.TOLD)]


def test_healthy_run_says_so(scripted, show, tmp_path: Path) -> None:
    scripted(tmp_path / "well").train(300).finish()
    text = said(show(tmp_path / "well"))
    assert "level-healthy" in text
    assert "None found." in text


def test_address_sets_steps_and_module(scripted, show, tmp_path: Path) -> None:
    scripted(tmp_path / "a").train(300).finish()
    app = show(tmp_path, from_="50", to="99", module="blocks.2.mlp.weight", metric="param_norm")
    assert not app.exception
    low, high = charts(app)[0]["layout"]["xaxis"]["range"]
    assert 49 <= low <= 50
    assert 99 <= high <= 100
    assert app.selectbox(key=Key.MODULE).value == "blocks.2.mlp.weight"
    assert app.selectbox(key=Key.METRIC).value == "param_norm"
    app.button(key=Key.WHOLE).click().run()
    assert charts(app)[0]["layout"]["xaxis"]["range"][1] > 299


@pytest.mark.parametrize(
    "address", [{"from_": "5000"}, {"from_": "90", "to": "10"}, {"from_": "x"}, {"module": "none"}]
)
def test_foolish_address_shows_the_whole_run(scripted, show, tmp_path: Path, address: dict[str, str]) -> None:
    scripted(tmp_path / "a").train(100).finish()
    app = show(tmp_path, **address)
    assert not app.exception
    assert charts(app)[0]["layout"]["xaxis"]["range"][1] > 99


def test_address_cannot_leave_the_folder(scripted, show, tmp_path: Path) -> None:
    scripted(tmp_path / "runs" / "a").train(10).finish()
    scripted(tmp_path / "secret").train(10).finish()
    app = show(tmp_path / "runs", run="../secret")
    assert app.selectbox(key=Key.RUN).value == "a"


def test_newest_run_first_and_nested_runs_named_by_path(scripted, show, tmp_path: Path) -> None:
    scripted(tmp_path / "x" / "same").train(10).finish()
    scripted(tmp_path / "y" / "same").train(10).finish()
    assert sorted(show(tmp_path).selectbox(key=Key.RUN).options) == ["x/same", "y/same"]


def test_a_run_that_begins_does_not_take_the_page(scripted, show, tmp_path: Path) -> None:
    scripted(tmp_path / "old").train(30).finish()
    app = show(tmp_path)
    scripted(tmp_path / "new").train(10).finish()
    data.list_runs.clear()
    app.run()
    assert sorted(app.selectbox(key=Key.RUN).options) == ["new", "old"]
    assert app.selectbox(key=Key.RUN).value == "old"


def test_map_marks_nan(scripted, show, tmp_path: Path) -> None:
    """Oracle: planted fault (a NaN gradient in the second tensor at step 40)."""
    scripted(tmp_path / "a", nan=40).train(80).finish()
    app = show(tmp_path)
    assert "NaN" in said(app) or "non-finite" in said(app).lower()
    assert app.selectbox(key=Key.MODULE).value == "blocks.0.mlp.weight"


def test_hostile_names_are_shown_as_text(scripted, show, tmp_path: Path) -> None:
    modules = ("a.weight", EVIL)
    scripted(tmp_path / "r<b>u", modules=modules, nan=40).train(80).finish()
    app = show(tmp_path)
    text = said(app)
    assert "<img" not in text
    assert ":material/home:" not in "".join(e.label for e in app.expander)
    for figure in app.get("plotly_chart"):
        assert "<img" not in figure.proto.spec


def test_thresholds_without_calibration_are_told_once(show) -> None:
    """Oracle: golden. The collapse of attention is decided by a rule that is experimental."""
    app = show(SAMPLES / "attention_growth")
    first = next(h.body for h in app.html if 'class="mon-incident"' in h.body)
    assert first.lower().count("experimental") == 1


def test_hostile_facts_are_shown_or_left_out(scripted, show, tmp_path: Path) -> None:
    path = scripted(tmp_path / "a").train(60).finish()
    info = json.loads((path / "run.json").read_text())
    info["facts"] = {"class": ["<b>x"], "parameters": [{"name": "<b>p", "numel": "many"}], "optimizers": [{}]}
    info["drops"] = {"<b>rows": {"<b>x": 1}}
    info["overhead"] = {"fraction": "NaN"}
    info["versions"] = {"<b>": ["<b>"]}
    info["absent"] = [{"what": "<b>w", "why": "<b>y"}]
    info["warnings"] = ["<b>warned"]
    info["created"] = "<b>"
    (path / "run.json").write_text(json.dumps(info))
    text = said(show(tmp_path))
    assert "<b>" not in text
    assert "&lt;b&gt;warned" in text
    assert "&lt;b&gt;w" in text


def empty(path: Path) -> None:
    path.mkdir()


def foreign(path: Path) -> None:
    path.mkdir()
    (path / "events.out").write_bytes(b"\x00")


def not_json(path: Path) -> None:
    path.mkdir()
    (path / "run.json").write_text("{")


def newer(path: Path) -> None:
    path.mkdir()
    (path / "run.json").write_text('{"schema": 99}')


@pytest.mark.parametrize("make", [empty, foreign, not_json, newer, lambda path: None])
def test_unreadable_folder_is_one_line(make: Callable[[Path], None], show, tmp_path: Path) -> None:
    make(tmp_path / "x")
    app = show(tmp_path / "x")
    text = said(app)
    assert text.count("No run to show") == 1
    assert "Traceback" not in text


def test_run_without_steps(scripted, show, tmp_path: Path) -> None:
    run = scripted(tmp_path / "a")
    assert "No step has been recorded yet" in said(show(tmp_path))
    run.writer.close("interrupted")
    assert "No step was recorded." in said(show(tmp_path))


def test_run_of_one_step(scripted, show, tmp_path: Path) -> None:
    """Oracle: definition. One of everything is not called many, and the only step has its label."""
    text = said(app := show(scripted(tmp_path / "a", modules=("w",)).train(1).finish()))
    assert "1 step<" in text
    assert "1 tensor " in text
    assert all(figure["layout"]["xaxis"]["tickvals"] == [0] for figure in charts(app))


def test_damaged_part_is_named_and_the_rest_shown(scripted, show, tmp_path: Path) -> None:
    path = scripted(tmp_path / "a").train(100).finish()
    (part,) = (path / "rank0" / "series").iterdir()
    part.write_bytes(part.read_bytes()[:-50])
    text = said(show(tmp_path))
    assert part.name in text


def test_live_run_can_be_paused(scripted, show, tmp_path: Path) -> None:
    run = scripted(tmp_path / "a").train(60)
    app = show(tmp_path)
    assert "recording" in said(app)
    assert app.toggle(key=Key.LIVE).value is True
    app.toggle(key=Key.LIVE).set_value(False).run()
    assert not app.exception
    run.finish()
    app.run()
    assert "finished" in said(app)


def test_reading_is_cached_until_something_is_written(scripted, tmp_path: Path) -> None:
    run = scripted(tmp_path / "a").train(20)
    first = data.view(run.path)
    assert data.view(run.path) is first
    assert first.line("loss.value", "", 0, 19, False) is first.line("loss.value", "", 0, 19, False)
    run.train(1)
    assert data.view(run.path).run.last_step == 20
    shutil.copytree(run.path, tmp_path / "b")
    assert data.view(tmp_path / "b") is not first
    run.finish()


def test_following_a_run_reads_what_is_new(scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: counts, invariance. However long a run is, a look at it reads what was added, and shows the whole."""
    rows = []
    real = Run._points

    def counting(run: Run, *args: Any) -> Iterator[Points]:
        for points in real(run, *args):
            rows.append(len(points.steps))
            yield points

    monkeypatch.setattr(Run, "_points", counting)

    def looked(view: data.View) -> list[Any]:
        last = view.span[1]
        lines = [
            view.line(ref, m, 0, last, False) for ref, m in (("loss.value", ""), ("logit_norm.mean", "cross_entropy"))
        ]
        grid, _ = view.grid("grad_norm.norm", 0, last), view.remarks
        return [*lines, grid]

    run = scripted(tmp_path / "a", spike=1700)
    for _ in range(8):
        run.train(500).flush()
    run.train(10)
    looked(data.view(run.path))
    whole = sum(rows)
    run.train(20)
    rows.clear()
    loss, norm, grid = looked(data.view(run.path))
    assert 0 < sum(rows) < whole / 20
    fresh = looked(data.View(open_run(run.path)))
    for ours, theirs in zip((loss, norm), fresh[:2], strict=True):
        assert ours.count == theirs.count == 4030 and ours.reduced
        np.testing.assert_array_equal(ours.high, theirs.high)
    np.testing.assert_array_equal(grid.values, fresh[2].values)
    assert loss.high.max() > 7


@pytest.mark.parametrize("live", [False, True])
def test_a_page_is_drawn_once(scripted, show, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, live: bool) -> None:
    """Oracle: counts. A first visit draws a page once; drawn twice, it would all be sent twice."""
    drawn = []
    real = markup.verdict
    monkeypatch.setattr(markup, "verdict", lambda v: drawn.append(v) or real(v))
    run = scripted(tmp_path / "a").train(60)
    if not live:
        run.finish()
    assert ("recording" in said(show(tmp_path))) == live
    assert len(drawn) == 1


def test_every_page_is_found() -> None:
    titles = [p.title for p in load_pages()]
    assert titles[0] == "Overview"
    assert len(set(titles)) == len(titles)


def test_imports_neither_torch_nor_the_command_line() -> None:
    code = (
        "import sys, pkgutil, importlib, monitor_dashboard as d\n"
        "for m in pkgutil.walk_packages(d.__path__, 'monitor_dashboard.'):\n"
        "    importlib.import_module(m.name)\n"
        "print([m for m in ('torch', 'typer', 'monitor_cli', 'duckdb') if m in sys.modules])"
    )
    path = [str(Path(monitor_dashboard.__file__).parents[1]), str(Path(data.__file__).parents[2])]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
