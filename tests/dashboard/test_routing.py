"""The routing page: loads of one router's experts, pathways never without their control, a line where there is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from monitor_dashboard import data
from monitor_dashboard.keys import Key

SAMPLES = Path(__file__).parents[2] / "sample_runs"


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch) -> Callable[..., AppTest]:
    """Runs the page on a run, with an address."""

    def run(folder: Path, **address: str) -> AppTest:
        monkeypatch.setenv(data.RUNS_VARIABLE, str(folder))
        app = AppTest.from_function(_only_routing, default_timeout=60)
        for name, value in address.items():
            app.query_params[name] = value
        app.run()
        assert not app.exception, app.exception
        return app

    return run


def _only_routing() -> None:
    from monitor_dashboard import data
    from monitor_dashboard.page.routing import PAGE

    (path,) = data.list_runs(data.runs_root()).values()
    PAGE.render(data.view(path))


def test_a_mixture_of_experts(show: Callable[..., AppTest]) -> None:
    """Oracle: golden. Eight experts on the map; smoothness, distance and churn are drawn with z-loss and entropy."""
    app = show(SAMPLES / "moe_digits", router="layers.2.router")
    assert app.selectbox(key=Key.ROUTER).value == "layers.2.router"
    assert len(app.selectbox(key=Key.ROUTER).options) == 4
    loads, balance, pathways = (json.loads(c.proto.spec) for c in app.get("plotly_chart"))
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
