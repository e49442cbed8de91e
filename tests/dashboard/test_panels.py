"""Strips of a metric: which lines, under which names, on which scale; which findings are pinned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from monitor.block import ColumnBlock
from monitor.store.writer import RunWriter
from monitor_dashboard import data, panels
from monitor_dashboard.data import View

SPAN = (0, 99)


def recorded(folder: Path, columns: dict[str, dict[str, list[float]]]) -> View:
    """A run of a hundred steps with these series: column -> module -> values."""
    writer = RunWriter.create(folder, script="train.py")
    blocks = []
    for ref, series in columns.items():
        metric, _, column = ref.partition(".")
        values = np.array([*series.values()]).T
        blocks.append(ColumnBlock(metric, column, np.arange(100), tuple(series), values, np.ones_like(values, bool)))
    writer.append(blocks)
    writer.flush(force=True)
    writer.close("finished")
    return data.view(writer.path)


def test_names_and_number_of_lines(tmp_path: Path) -> None:
    """Oracle: definition. A column that several modules have is told by them; beyond eight, the rest are counted."""
    many = {f"layer.{i}": [1.0] * 100 for i in range(1200)}
    view = recorded(tmp_path / "a", {"nlm_cos.cos": many, "nlm_cos.total": {"": [0.5] * 100}})
    strip = panels.strip(view, ["nlm_cos.total", "nlm_cos.cos"], SPAN, title="t", caption="c")
    assert strip is not None
    assert list(strip.lines) == ["total", *(f"layer.{i}" for i in range(7))]
    assert strip.caption == "c (8 of 1,201)"
    assert view.line.cache_info().misses == 8
    one = panels.strip(view, ["nlm_cos.cos"], SPAN, title="t", caption="c", only=("layer.7",))
    assert one is not None and list(one.lines) == ["cos"]
    assert panels.strip(view, ["nlm_cos.none"], SPAN, title="t", caption="c") is None


@pytest.mark.parametrize(
    ("refs", "unit"),
    [
        (["sharpness.value"], "loss/weight²"),
        (["logit_norm.mean", "logit_norm.max"], "nats"),
        (["router_balance.margin", "router_balance.experts"], ""),
        (["update_ratio.ratio"], ""),
        (["train_accuracy.accuracy"], ""),
        (["loss.value"], ""),
        (["of_tomorrow.value"], ""),
    ],
)
def test_unit_of_a_strip(refs: list[str], unit: str, tmp_path: Path) -> None:
    """Oracle: definition. That of all its columns, where values do not say it themselves."""
    view = recorded(tmp_path / "a", {ref: {"": [1.0] * 100} for ref in refs})
    strip = panels.strip(view, refs, SPAN, title="t", caption="c")
    assert strip is not None and strip.unit == unit


def test_a_log_scale_that_does_not_fit_is_given_up(tmp_path: Path) -> None:
    """Oracle: closed form. A quarter of the values may have no place on it; NaN has none on any scale."""
    for below, log in ((25, True), (26, False)):
        view = recorded(tmp_path / str(below), {"nlm_rate.rate": {"": [-1.0] * below + [10.0] * (100 - below)}})
        strip = panels.strip(view, ["nlm_rate.rate"], SPAN, title="t", caption="c", log=True)
        assert strip is not None
        assert strip.log is log
        assert strip.lines["rate"].odd_count == (below if log else 0)
    view = recorded(tmp_path / "nan", {"nlm_rate.rate": {"": [np.nan] * 100}})
    strip = panels.strip(view, ["nlm_rate.rate"], SPAN, title="t", caption="c", log=True)
    assert strip is not None and strip.log


def test_findings_are_pinned_where_they_are_seen(scripted, tmp_path: Path) -> None:
    """Oracle: planted fault (a loss spike at step 200). The head has the number of its incident, if asked for."""
    view = data.view(scripted(tmp_path / "a", spike=200).train(300).finish())
    pins = panels.pins(view, (0, 299))
    assert {pin.first for pin in pins} == {200}
    assert [pin.label for pin in pins if pin.label] == [str(i) for i, _ in enumerate(view.verdict.incidents, start=1)]
    assert not any(pin.label for pin in panels.pins(view, (0, 299), numbered=False))
    assert panels.pins(view, (0, 199)) == []
    module = "blocks.0.attn.weight"
    assert all(module in pin.text for pin in panels.pins(view, (0, 299), module))
