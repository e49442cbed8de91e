"""The routing page: loads of one router's experts, pathways never without their control, a line where there is none."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from streamlit.testing.v1 import AppTest

from monitor_dashboard.keys import Key
from tests.dashboard.kit import SAMPLES, charts


@pytest.fixture
def show(show_page: Callable[..., AppTest]) -> Callable[..., AppTest]:
    """Runs the page on a run, with an address."""
    return partial(show_page, "Routing")


def test_a_mixture_of_experts(show: Callable[..., AppTest]) -> None:
    """Oracle: golden. Eight experts on the map; smoothness, distance and churn are drawn with z-loss and entropy."""
    app = show(SAMPLES / "moe_digits", router="layers.2.router")
    assert app.selectbox(key=Key.ROUTER).value == "layers.2.router"
    assert len(app.selectbox(key=Key.ROUTER).options) == 4
    loads, balance, pathways = charts(app)
    assert [t.rpartition("[")[2] for t in loads["layout"]["yaxis"]["ticktext"]] == [f"{e}]" for e in range(8)]
    titles = [a["text"] for a in balance["layout"]["annotations"]]
    assert any("experts in use" in t for t in titles)
    titles = [a["text"] for a in pathways["layout"]["annotations"]]
    for title in ("pathway smoothness", "pathway distance", "pathway churn", "control: z-loss", "control: entropy"):
        assert any(title in t for t in titles), title
    text = "\n".join(h.body for h in app.html)
    assert "8 experts, 2 for each token" in text
    assert "show no generalisation by themselves" in text


def test_a_run_without_routers_says_so(show: Callable[..., AppTest]) -> None:
    """Oracle: planted fault, absent."""
    app = show(SAMPLES / "digits_input_jump")
    assert [h.body for h in app.html] == ['<div class="mon-line">No router of experts was seen in this run.</div>']
    assert not app.get("plotly_chart")


def test_chosen_steps_are_shown(show: Callable[..., AppTest]) -> None:
    """Oracle: invariance. The steps of the address are those of every chart."""
    for figure in charts(show(SAMPLES / "moe_digits", from_="304", to="609")):
        low, high = figure["layout"]["xaxis"]["range"]
        assert 300 < low <= 304 and 609 <= high < 613
