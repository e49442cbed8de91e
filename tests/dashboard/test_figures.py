"""Figures hold few points, draw nothing from a name but its letters, and show the steps they are told to."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitor_dashboard import figures, sampling
from monitor_dashboard.figures import Panel, Pin
from monitor_dashboard.sampling import MAX_POINTS, MISSING, NAN, VALUE, Grid
from monitor_dashboard.theme import LIGHT

EVIL = "<b>x</b> <a href='http://192.0.2.1'>%{x}</a>"


def panel(name: str, n: int, *, log: bool = False) -> Panel:
    values = 1 + np.abs(np.random.default_rng(0).normal(size=n))
    values[n // 2] = np.nan
    return Panel(name, name, name, {name: sampling.line(np.arange(n), values, log=log)}, log, 100)


def strings(value: object) -> list[str]:
    """Every string in a figure."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [s for k, v in value.items() if k != "bdata" for s in strings(v)]
    if isinstance(value, list | tuple | np.ndarray):
        return [s for v in value for s in strings(v)]
    return []


def test_no_trace_is_long_and_steps_are_explicit() -> None:
    figure: Any = figures.lines([panel("loss", 50_000), panel("other", 50_000)], [], (100, 900), LIGHT)
    assert all(len(trace["x"]) <= MAX_POINTS for trace in figure.to_dict()["data"])
    low, high = figure.layout["xaxis"].range
    assert 90 < low < 100
    assert 900 < high < 910
    assert figure.layout["xaxis"].fixedrange


def test_band_has_the_gaps_of_its_line() -> None:
    """Oracle: planted fault (every third bucket without a finite value, and a series of nothing but NaN)."""
    values = np.ones(10_000)
    values[np.arange(10_000) // 10 % 3 == 0] = np.nan
    for series in (values, np.full(10_000, np.nan)):
        strip = Panel("loss", "", "", {"loss": sampling.line(np.arange(10_000), series)}, False, 100)
        figure: Any = figures.lines([strip], [], (0, 9_999), LIGHT)
        band = figure.data[0]
        assert len(band["x"]) <= MAX_POINTS
        assert np.isnan(band["x"]).sum() == np.isnan(band["y"]).sum()
        assert (~np.isnan(band["y"])).sum() == 2 * (~np.isnan(figure.data[1]["y"])).sum()


def test_every_trace_stands_within_its_scale() -> None:
    """Oracle: invariance (whatever is drawn on a log scale, marks included, lies within its limits)."""
    figure: Any = figures.lines([panel("loss", 500, log=True)], [], (0, 499), LIGHT)
    low, high = figure.layout["yaxis"].range
    for trace in figure.data:
        y = np.log10(np.array(trace["y"], dtype=float))
        y = y[~np.isnan(y)]
        assert ((low - 1e-9 <= y) & (y <= high + 1e-9)).all()


def test_pins_are_numbered_and_told() -> None:
    pins = [Pin(10, 20, "critical", "1", "collapsed"), Pin(15, 15, "warning", "", "spiked")]
    figure: Any = figures.lines([panel("loss", 50)], pins, (0, 49), LIGHT)
    marks = [t for t in figure.data if t["yaxis"] == "y20"]
    assert [list(t["x"]) for t in marks] == [[15], [10]]
    assert list(marks[1]["text"]) == ["1"]
    assert "collapsed" in marks[1]["customdata"][0]
    assert [s.type for s in figure.layout["shapes"]] == ["rect", "line"]


def test_hostile_names_are_text() -> None:
    pins = [Pin(1, 2, "warning", "1", EVIL)]
    grid = Grid((EVIL, "a.b"), np.arange(3), 1, np.ones((2, 3)), np.full((2, 3), VALUE, dtype=np.int8))
    shown = [
        figures.lines([panel(EVIL, 50)], pins, (0, 49), LIGHT),
        figures.heat_map(grid, EVIL, EVIL, (0, 2), LIGHT, log=True)[0],
    ]
    for figure in shown:
        for text in strings(figure.to_dict()):
            assert "href=" not in text or "&lt;a" in text
            assert "<a" not in text
            assert "<b>x" not in text
            if "<extra>" in text:
                assert "x}&lt;/a" not in text.replace("&#37;{x}", "")


def test_map_marks_what_is_not_a_number() -> None:
    values = np.array([[1.0, np.nan, 0.0], [1e-3, 10.0, np.nan]])
    state = np.array([[VALUE, NAN, VALUE], [VALUE, VALUE, MISSING]], dtype=np.int8)
    figure: Any
    figure, curves = figures.heat_map(
        Grid(("a", "b"), np.arange(3), 1, values, state), "t", "a", (0, 2), LIGHT, log=True
    )
    colour, broken = figure.data[0], figure.data[1]
    np.testing.assert_array_equal(np.isnan(broken["z"]), state != NAN)
    # an exact 0 has the lowest colour; a missing cell has none
    assert colour["z"][0][2] == colour["zmin"]
    assert np.isnan(colour["z"][1][2])
    assert curves == ["", "", "a", "b"]
    # what a click can hit is what was recorded
    assert [len(t["x"]) for t in figure.data[2:]] == [3, 2]
    assert np.isnan(figure.data[2]["customdata"][1])


def test_map_of_nothing_but_nan() -> None:
    state = np.full((1, 2), NAN, dtype=np.int8)
    figure: Any
    figure, _ = figures.heat_map(
        Grid(("a",), np.arange(2), 1, np.full((1, 2), np.nan), state), "t", "", (0, 1), LIGHT, log=True
    )
    assert figure.data[0]["zmin"] < figure.data[0]["zmax"]


def test_short_names() -> None:
    names = ["h.0.attn.weight", "h.0.mlp.weight", "h.10.mlp.weight"]
    assert figures.short_names(names) == ["…0.attn.weight", "…0.mlp.weight", "…10.mlp.weight"]
    assert figures.short_names(["weight", "bias"]) == ["weight", "bias"]
    assert figures.short_names(["a.b"]) == ["a.b"]


@pytest.mark.parametrize(
    ("low", "high", "log", "words"),
    [
        (-0.06, 1.06, False, ["0", "0.5", "1.0"]),
        (0, 7, False, ["0", "5"]),
        (3.19, 3.71, False, ["3.2", "3.4", "3.6"]),
        (0.99999, 1.00001, False, ["0.99999", "1.00000", "1.00001"]),
        (-5e5, 2.1e6, False, ["0", "1e6", "2e6"]),
        (0, 2.4e-5, False, ["0", "1e-5", "2e-5"]),
        (-6.5, 0.3, True, ["1e-6", "1e-4", "0.01", "1"]),
        (-2.0, 5.0, True, ["0.01", "10", "10,000"]),
        (-3.3, -1.9, True, ["0.001", "0.01"]),
        (0.2, 0.9, True, ["2", "5"]),
        (0.50, 0.58, True, ["3.2", "3.4", "3.6", "3.8"]),
    ],
)
def test_labels_of_an_axis(low: float, high: float, log: bool, words: list[str]) -> None:
    """Oracle: closed form (round numbers within the limits, told apart and written alike)."""
    at, found = figures.scale(low, high, log=log, room=3)
    assert found == words
    assert [float(w.replace(",", "")) for w in found] == pytest.approx(at)
    assert len(set(found)) == len(found)
    place = [math.log10(v) for v in at] if log else at
    assert all(low - 1e-9 <= v <= high + 1e-9 for v in place)


@given(st.floats(-12, 12), st.floats(-4, 4), st.integers(3, 6), st.booleans())
def test_any_axis_has_labels(middle: float, size: float, room: int, log: bool) -> None:
    """Oracle: invariance. Whatever the limits: two to ten labels, all different."""
    half = 0.01 + abs(size) if log else 10.0**size
    at, found = figures.scale(middle - half, middle + half, log=log, room=room)
    assert 2 <= len(at) <= 10
    assert len(set(found)) == len(found)
