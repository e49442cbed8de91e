"""The page in a real browser: it follows a run that is being written, keeps the chosen steps, asks nobody else."""

from __future__ import annotations

import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.dashboard.kit import wait_for

#: Names that would fetch something, or run, if anything took them for markup.
EVIL = "blocks.9.<img src=http://192.0.2.1/x.png onerror=alert(1)>![x](http://192.0.2.1/y.png):material/home:%{x}"
RANGE = "() => document.querySelector('.js-plotly-plot').layout.xaxis.range"

pytestmark = pytest.mark.browser


def test_compare_in_a_browser(scripted, serve, page, tmp_path: Path) -> None:
    """Oracle: real browser, planted fault (hostile names). A button shows the series that parts; nobody is asked."""
    modules = ("a.weight", EVIL)
    scripted(tmp_path / "runs" / "good", modules=modules).train(120).finish()
    scripted(tmp_path / "runs" / "<b>bad", modules=modules, nan=60).train(120).finish()
    page.goto(f"{serve(tmp_path / 'runs')}/compare?run=good")
    page.wait_for_selector(".js-plotly-plot", timeout=60_000)
    assert "<b>bad" in page.locator(".mon-grid").first.inner_text()
    assert "identical until step 59" in page.locator(".mon-incident").inner_text()
    page.get_by_role("button", name="Show grad_norm.norm").click()
    wait_for(lambda: "grad_norm.norm" in page.evaluate("location.search"), "the address has the series")
    wait_for(lambda: "grad_norm.norm" in page.locator(".js-plotly-plot").first.inner_text(), "the chart shows it")
    assert page.locator("img[src*='192.0.2.1']").count() == 0
    assert {urlsplit(url).hostname for url in page.asked if not url.startswith(("data:", "blob:"))} == {"127.0.0.1"}
    # Streamlit looks for its own files below a page's address first
    assert [line for line in page.wrong if "404" not in line] == []


def test_live_run_in_a_browser(scripted, serve, page, tmp_path: Path) -> None:
    """Oracle: planted faults (a spike, a hostile name), and what a person would see and do."""
    run = scripted(tmp_path / "runs" / "<b>live</b>", modules=("a.weight", "b.weight", EVIL), spike=150)
    run.train(240).flush().train(10)
    page.goto(serve(tmp_path / "runs"))
    page.wait_for_selector(".js-plotly-plot .heatmaplayer", timeout=60_000)

    def steps(n: int) -> bool:
        return f"{n} steps" in page.locator(".mon-head").inner_text()

    def visible() -> list[float]:
        return page.evaluate(RANGE)

    def address() -> str:
        return page.evaluate("location.href")

    assert steps(250)
    assert "recording" in page.locator(".mon-head").inner_text()
    assert "spike" in page.locator(".mon-verdict").inner_text().lower()
    assert 249 < visible()[1] < 252

    # it follows the run
    run.train(20)
    wait_for(lambda: steps(270), "new steps are shown")
    wait_for(lambda: 269 < visible()[1] < 272, "the last step moves on")

    # a drag chooses steps, and they stay chosen while the run goes on
    chart = page.locator(".js-plotly-plot").first.bounding_box()
    page.mouse.move(chart["x"] + 500, chart["y"] + 100)
    page.mouse.down()
    page.mouse.move(chart["x"] + 700, chart["y"] + 110, steps=5)
    page.mouse.up()
    wait_for(lambda: "from=" in address() and "to=" in address(), "the address has the steps")
    wait_for(lambda: visible()[1] < 260, "the chart shows them")
    chosen, link = visible(), address()
    run.train(20)
    wait_for(lambda: steps(290), "new steps are shown")
    time.sleep(0.5)  # the charts are drawn after the words
    assert visible() == chosen
    assert address() == link

    # a click on a row shows its series
    rows = page.locator(".js-plotly-plot").nth(1).bounding_box()
    page.mouse.click(rows["x"] + 600, rows["y"] + 32 + 64 / 6)
    wait_for(lambda: page.locator(".mon-module").inner_text() == "a.weight", "the row is chosen")
    page.mouse.move(rows["x"] + 600, rows["y"] + 32 + 64 * 5 / 6)
    wait_for(lambda: "%{x}" in (page.locator(".hoverlayer").nth(1).text_content() or ""), "the hostile name is told")

    # paused, it stands still
    page.get_by_text("follow the run").click()
    wait_for(lambda: "live=" in address(), "the address says so")
    time.sleep(2)  # what was asked for before the pause is drawn
    run.train(20)
    time.sleep(3)
    assert steps(290)
    page.get_by_text("follow the run").click()
    wait_for(lambda: steps(310), "it follows again")

    # the end of the run is seen
    run.finish()
    wait_for(lambda: "finished" in page.locator(".mon-head").inner_text(), "the end is shown")
    page.screenshot(path=str(tmp_path / "page.png"))
    assert page.locator("img[src*='192.0.2.1']").count() == 0
    assert {urlsplit(url).hostname for url in page.asked if not url.startswith(("data:", "blob:"))} == {"127.0.0.1"}
    assert page.wrong == []
    log = (tmp_path / "server.log").read_text(encoding="utf-8")
    assert "Traceback" not in log, log
