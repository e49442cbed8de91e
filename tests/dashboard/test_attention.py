"""The attention page: heads of layers on a map, series of the one chosen, a line where there is nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from streamlit.testing.v1 import AppTest

from monitor.metric import Block
from monitor_dashboard import figures
from monitor_dashboard.keys import Key
from monitor_dashboard.page.attention import latest
from monitor_dashboard.sampling import INF, MISSING, NAN, VALUE
from monitor_dashboard.theme import LIGHT
from tests.dashboard.kit import SAMPLES, charts

REF = "attn_logit_max.found"


@pytest.fixture
def show(show_page: Callable[..., AppTest]) -> Callable[..., AppTest]:
    """Runs the page on a run, with an address."""
    return partial(show_page, "Attention")


def test_heads_of_a_sick_run(show: Callable[..., AppTest]) -> None:
    """Oracle: golden. The map has two layers of two heads; the head of the first finding is the one chosen."""
    app = show(SAMPLES / "attention_growth")
    figure, series = charts(app)
    assert figure["layout"]["yaxis"]["ticktext"] == ["blocks.0", "blocks.1"]
    assert len(figure["data"][2]["customdata"]) == 4
    assert app.selectbox(key=Key.HEAD_METRIC).options == [
        "largest logit", "bound of the logit", "entropy", "first key", "alignment",
    ]  # fmt: skip
    text = "\n".join(h.body for h in app.html)
    assert "Attention logits too large" in text
    assert str(app.selectbox(key=Key.HEAD).value) in text
    assert sum(t["mode"] == "lines" for t in series["data"]) == 5


def test_address_sets_metric_head_and_step(show: Callable[..., AppTest]) -> None:
    """Oracle: invariance. A link shows the same view; a step without values shows the last ones before it."""
    app = show(SAMPLES / "attention_growth", attention="entropy", head="blocks.0[1]", at="117")
    assert app.selectbox(key=Key.HEAD_METRIC).value == "entropy"
    assert app.selectbox(key=Key.HEAD).value == "blocks.0[1]"
    assert any("step 110" in h.body for h in app.html)


def test_a_run_without_attention_says_so(show: Callable[..., AppTest]) -> None:
    """Oracle: planted fault, absent."""
    app = show(SAMPLES / "digits_input_jump")
    assert [h.body for h in app.html] == ['<div class="mon-line">No attention was recorded in this run.</div>']
    assert not app.get("plotly_chart")


def block(modules: tuple[str, ...], rows: list[list[float | None]]) -> Block:
    values = np.array([[np.nan if v is None else v for v in row] for row in rows])
    has = np.array([[v is not None for v in row] for row in rows])
    return Block(np.arange(len(rows), dtype=np.int64) * 10, modules, {REF: values}, {REF: has})


def test_last_value_of_each_head() -> None:
    """Oracle: naive transcription by hand. Layers of different width, a head that was not seen, NaN and inf."""
    nan, inf = float("nan"), float("inf")
    modules = ("a[0]", "b.c[0]", "b.c[2]", "a[1]", "whole")
    heads, step = latest(block(modules, [[1.0, 5.0, 6.0, None, 9.0], [2.0, nan, None, inf, 9.0]]), REF)
    assert heads.layers == ("a", "b.c")
    np.testing.assert_array_equal(heads.values, [[2, inf, nan], [nan, nan, 6]])
    np.testing.assert_array_equal(heads.state, [[VALUE, INF, MISSING], [NAN, MISSING, VALUE]])
    assert step == 10
    assert latest(block((), [[], []]), REF)[1] == -1


def test_map_shows_every_head_and_draws_nothing_from_names() -> None:
    """Oracle: definition. One point to click per recorded head, a frame on the chosen one, broken cells apart."""
    evil = "b.<img src=http://192.0.2.1/x>%{x}"
    heads, _ = latest(block((f"{evil}[0]", f"{evil}[1]", "a.q[0]"), [[10.0, float("nan"), -2.0]]), REF)
    for log in (True, False):
        figure, points = figures.head_map(heads, "largest logit", "a.q[0]", LIGHT, log=log)
        drawn: Any = figure
        assert points == [f"{evil}[0]", f"{evil}[1]", "a.q[0]"]
        colours, broken, clicked = drawn.data
        assert np.nansum(broken["z"]) == 1 and broken["z"][0, 1] == 1
        assert np.isnan(colours["z"]).sum() == 2  # NaN, and a head the second layer does not have
        assert colours["z"][0, 0] == (1 if log else 10)
        assert len(clicked["x"]) == 3
        *_, frame = drawn.layout.shapes  # the last lies on top
        assert (frame.x0, frame.y0) == (-0.5, 0.5)
        assert "<img" not in str(figure.to_json())
        assert "%{x}" not in clicked["hovertemplate"] + str(clicked["customdata"])


@pytest.mark.browser
def test_clicking_a_head_in_a_browser(serve: Any, page: Any) -> None:
    """Oracle: real browser. A click in the map shows that head; nothing goes wrong and nobody else is asked."""
    address = serve(SAMPLES / "attention_growth")
    page.goto(f"{address}/attention?head=blocks.0%5B0%5D")
    page.wait_for_selector(".js-plotly-plot .heatmaplayer", timeout=60_000)
    page.wait_for_timeout(800)
    area = page.locator(".js-plotly-plot .nsewdrag").first.bounding_box()
    page.mouse.click(area["x"] + area["width"] * 0.75, area["y"] + area["height"] * 0.75)
    page.wait_for_function("() => decodeURIComponent(location.search).includes('blocks.1[1]')", timeout=30_000)
    # Streamlit looks for its own files below a page's address first
    assert [line for line in page.wrong if "404" not in line] == []
    assert {urlsplit(url).hostname for url in page.asked if not url.startswith(("data:", "blob:"))} == {"127.0.0.1"}
