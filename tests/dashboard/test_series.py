"""The Series page: everything that was recorded can be reached, only what is shown is read, texts are texts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from streamlit.testing.v1 import AppTest

import monitor
from monitor_dashboard import data, panels
from monitor_dashboard.keys import Key
from tests.dashboard.kit import SAMPLES, charts, said

EVIL = "<img src=http://192.0.2.1/x>:material/home:\x1b[31m"


@pytest.fixture
def show(show_page: Callable[..., AppTest]) -> Callable[..., AppTest]:
    """Runs the page on a run, with an address."""
    return partial(show_page, "Series")


def titles(app: AppTest) -> list[str]:
    annotations = charts(app)[0]["layout"]["annotations"]
    return [a["text"][3:-4] for a in annotations if a["text"].startswith("<b>") and a["text"].endswith("</b>")]


@pytest.mark.parametrize("name", ["moe_digits", "edge_of_stability"])
def test_every_series_can_be_reached(name: str, show: Callable[..., AppTest]) -> None:
    """Oracle: invariance. Each metric of the run is offered, and its picture has a strip for each of its columns."""
    run = monitor.open(SAMPLES / name)
    app = show(SAMPLES / name)
    assert app.selectbox(key=Key.WHICH).value == "loss"
    metrics = app.selectbox(key=Key.WHICH).options
    recorded = [ref for ref in run.refs() if run.modules(ref)]
    assert set(metrics) == {ref.partition(".")[0] for ref in recorded}
    for metric in metrics[:: max(1, len(metrics) // 4)]:
        app.selectbox(key=Key.WHICH).set_value(metric).run()
        columns = [ref.partition(".")[2] for ref in recorded if ref.startswith(metric + ".")]
        assert titles(app) == [c[:24] for c in columns]


def test_address_and_filter_choose(show: Callable[..., AppTest]) -> None:
    """Oracle: definition. The modules whose name has the text; a line where there is none."""
    app = show(SAMPLES / "moe_digits", which="grad_norm", filter="ROUTER")
    drawn = [a["text"] for a in charts(app)[0]["layout"]["annotations"]]
    assert app.selectbox(key=Key.WHICH).value == "grad_norm"
    assert sum("  <b>" in t for t in drawn) == 4 * 3
    assert not any(t.startswith("first") for t in drawn)
    app.text_input(key=Key.FILTER).set_value("<zz>").run()
    assert "No module of grad_norm has" in said(app)
    assert "<zz>" not in said(app)
    assert not charts(app)


def test_only_what_is_drawn_is_read(scripted, show: Callable[..., AppTest], tmp_path: Path) -> None:
    """Oracle: invariance. Of 600 tensors, eight lines for each column are read, and a map shows the rest."""
    path = scripted(tmp_path / "wide", modules=tuple(f"layers.{i}.weight" for i in range(600))).train(30).finish()
    app = show(path, which="grad_norm")
    view = data.view(path)
    assert view.line.cache_info().misses == panels.MAX_LINES * 3
    lines, shown = charts(app)
    assert sum("8 of 600" in a["text"].replace("<br>", " ") for a in lines["layout"]["annotations"]) == 3
    assert len(shown["data"]) > 100
    assert "of 600 rows" in said(app)


def test_a_metric_of_another_version_is_shown(scripted, show: Callable[..., AppTest], tmp_path: Path) -> None:
    """Oracle: planted fault (a column that no definition here has)."""
    path = scripted(tmp_path / "a").train(60).finish()
    info = (path / "run.json").read_text()
    (path / "run.json").write_text(info.replace('"update_ratio"', '"of_tomorrow"'))
    app = show(path, which="of_tomorrow")
    assert "not known to this version" in said(app)
    assert titles(app) == ["ratio", "update_norm"]


def test_tables_are_shown_as_text(scripted, show: Callable[..., AppTest], tmp_path: Path) -> None:
    """Oracle: planted faults (hostile text in a cell and in a heading, a damaged table)."""
    run = scripted(tmp_path / "a").train(30)
    run.writer.table("notes", 7, {"step": np.array([7, 8]), EVIL: [EVIL, "plain"]})
    run.writer.table("none", 8, {"loss": np.array([], np.float64)})
    run.writer.table("notes", 9, {"step": np.array([9])})
    path = run.finish()
    app = show(path, table="notes at step 7")
    (table,) = app.dataframe
    assert table.value.shape == (2, 2)
    assert "\x1b" not in str(table.value.to_dict())
    assert not show(path, table="none at step 8").dataframe[0].value.size
    damaged = next(f for f in (path / "rank0" / "tables").iterdir() if "9" in f.name)
    damaged.write_bytes(b"no table")
    assert "cannot be read" in said(show(path, table="notes at step 9"))


def test_no_value_of_a_table_is_hidden(scripted, show: Callable[..., AppTest], tmp_path: Path) -> None:
    """Oracle: planted faults. NaN and infinity are told from what is missing; a small number keeps its digits."""
    run = scripted(tmp_path / "a").train(30)
    missing = np.eye(4, dtype=bool)
    x = np.ma.array([math.nan, math.inf, 0.0, -2.5e-9], mask=missing[2])
    y = np.ma.array([-2.5e-9, 0.0, 1.0, 2.0], mask=missing[1])
    run.writer.table("odd", 3, {"x": x, "y": y})
    (table,) = show(run.finish(), table="odd at step 3").dataframe
    x = table.value["x"].tolist()
    assert [*x[:2], x[3]] == ["nan", "inf", "-2.5e-09"] and pd.isna(x[2])
    assert table.value["y"].tolist()[0] == -2.5e-9
    assert json.loads(table.proto.columns)["y"]["type_config"]["format"] == "%.6g"


def test_a_run_without_steps_says_so(scripted, show: Callable[..., AppTest], tmp_path: Path) -> None:
    """Oracle: planted fault, absent."""
    run = scripted(tmp_path / "a")
    run.writer.close("interrupted")
    assert "No series was recorded." in said(show(run.path))
