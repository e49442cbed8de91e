"""Figures hold few points, draw nothing from a name but its letters, and show the steps they are told to."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitor_dashboard import figures, sampling
from monitor_dashboard.figures import Panel, Pin, axes, names
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
    marks = [t for t in figure.data if t["yaxis"] == "y100"]
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


def test_numbers_of_pins_do_not_lie_on_each_other() -> None:
    """Oracle: planted fault (five heads, three within a few steps). The worst keeps its number, no head its mark."""
    steps = (500, 100, 505, 110, 900)
    pins = [Pin(at, at, "warning", str(i), "spiked") for i, at in enumerate(steps, start=1)]
    figure: Any = figures.lines([panel("loss", 1000)], pins, (0, 999), LIGHT)
    marks = [(x, text) for t in figure.data if t.yaxis == "y100" for x, text in zip(t.x, t.text, strict=True)]
    assert sorted(marks) == [(100, "2"), (110, ""), (500, "1"), (505, ""), (900, "5")]


def test_fullest_map_is_sent_in_little() -> None:
    """Oracle: counts. Of as many cells as a map may have, one of them broken, each is sent in 20 bytes: a megabyte."""
    rows, (width, number) = sampling.MAX_ROWS, sampling.columns(0, 999_999, sampling.MAX_ROWS)
    values = np.random.default_rng(0).random((rows, number))
    state = np.full((rows, number), VALUE, dtype=np.int8)
    state[7, 9] = NAN
    grid = Grid(tuple(f"layers.{i}.weight" for i in range(rows)), width * np.arange(number), width, values, state)
    figure, _ = figures.heat_map(grid, "t", "", (0, 999_999), LIGHT, log=True)
    assert len(figure.to_json() or "") < 20 * values.size <= 20 * sampling.MAX_CELLS


def test_map_marks_what_is_not_a_number() -> None:
    values = np.array([[1.0, np.nan, 0.0], [1e-3, 10.0, np.nan]])
    state = np.array([[VALUE, NAN, VALUE], [VALUE, VALUE, MISSING]], dtype=np.int8)
    figure: Any
    figure, curves = figures.heat_map(
        Grid(("a", "b"), np.arange(3), 1, values, state), "t", "a", (0, 2), LIGHT, log=True
    )
    colour, broken = figure.data[0], figure.data[1]
    np.testing.assert_array_equal(broken["z"], state == NAN)
    # an exact 0 has the lowest colour; a missing cell has none
    assert colour["z"][0][2] == colour["zmin"]
    assert np.isnan(colour["z"][1][2])
    assert curves == ["", "", "a", "b"]
    # what a click can hit is what was recorded
    assert [len(t["y"]) for t in figure.data[2:]] == [3, 2]
    assert np.isnan(figure.data[2]["customdata"][1])


def test_map_of_nothing_but_nan() -> None:
    state = np.full((1, 2), NAN, dtype=np.int8)
    figure: Any
    figure, _ = figures.heat_map(
        Grid(("a",), np.arange(2), 1, np.full((1, 2), np.nan), state), "t", "", (0, 1), LIGHT, log=True
    )
    assert figure.data[0]["zmin"] < figure.data[0]["zmax"]


def test_short_names() -> None:
    modules = ["h.0.attn.weight", "h.0.mlp.weight", "h.10.mlp.weight"]
    assert names.short_names(modules) == ["…0.attn.weight", "…0.mlp.weight", "…10.mlp.weight"]
    assert names.short_names(["weight", "bias"]) == ["weight", "bias"]
    assert names.short_names(["a.b"]) == ["a.b"]


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
    at, found = axes.scale(low, high, log=log, room=3)
    assert found == words
    assert [float(w.replace(",", "")) for w in found] == pytest.approx(at)
    assert len(set(found)) == len(found)
    place = [math.log10(v) for v in at] if log else at
    assert all(low - 1e-9 <= v <= high + 1e-9 for v in place)


@given(st.floats(-12, 12), st.floats(-4, 4), st.integers(3, 6), st.booleans())
def test_any_axis_has_labels(middle: float, size: float, room: int, log: bool) -> None:
    """Oracle: invariance. Whatever the limits: two to ten labels, all different."""
    half = 0.01 + abs(size) if log else 10.0**size
    at, found = axes.scale(middle - half, middle + half, log=log, room=room)
    assert 2 <= len(at) <= 10
    assert len(set(found)) == len(found)


def words(figure: Any) -> list[str]:
    """What is written in and beside a figure."""
    return [a.text for a in figure.layout.annotations]


def strip(values: list[float], *, log: bool = False, name: str = "x") -> Panel:
    return Panel("t", "", "", {name: sampling.line(np.arange(len(values)), np.array(values), log=log)}, log, 60)


@pytest.mark.parametrize(
    ("values", "log", "said", "key"),
    [
        ([math.nan] * 3, False, "no finite value in these steps", "✕ 3 NaN"),
        ([math.nan, math.inf], True, "no finite value in these steps", "✕ 2 NaN, +inf"),
        ([0.0, -1.0], True, "no value above 0 in these steps", "✕ 2 ≤ 0"),
        ([], False, "nothing recorded in these steps", None),
        ([0.0, 0.0], False, None, None),
        ([1.0, math.inf], False, None, "✕ 1 +inf"),
    ],
)
def test_a_panel_says_what_it_cannot_draw(values: list[float], log: bool, said: str | None, key: str | None) -> None:
    """Oracle: definition. No scale is made up where there is nothing to measure, and every cross is explained."""
    figure: Any = figures.lines([strip(values, log=log)], [], (0, 5), LIGHT)
    assert [w for w in words(figure) if "in these steps" in w] == ([said] if said else [])
    assert [w for w in words(figure) if w.startswith("✕")] == ([key] if key else [])
    assert bool(figure.layout.yaxis.tickvals) == (said is None)


def test_every_line_has_its_name() -> None:
    """Oracle: invariance. A panel grows until the names of its lines fit, and no two of them are cut to the same."""
    modules = [f"blocks.{i}.attention.projection.{part}.weight" for i in range(4) for part in ("query", "value")]
    drawn = {name: sampling.line(np.arange(3), np.full(3, 0.01234)) for name in modules}
    figure: Any = figures.lines([Panel("t", "a caption " * 9, "", drawn, False, 60)], [], (0, 2), LIGHT)
    told = [a for a in figure.layout.annotations if "0.01234" in a.text]
    assert len({a.text for a in told}) == len(modules)
    assert max(-a.yshift for a in told) + 15 <= figure.layout.height


def test_findings_have_an_axis_of_their_own() -> None:
    """Oracle: planted fault (more panels than anybody thought of)."""
    figure: Any = figures.lines([panel(str(i), 20) for i in range(25)], [Pin(3, 4, "warning", "", "x")], (0, 19), LIGHT)
    (pins,) = (t for t in figure.data if t.marker.symbol == "triangle-down")
    assert pins.yaxis not in {t.yaxis for t in figure.data if t is not pins}
    assert pins.cliponaxis is False


@pytest.mark.parametrize("last", [0, 2, 8])
def test_few_steps_have_a_label_each(last: int) -> None:
    """Oracle: closed form. No step is named twice, and none that there is not."""
    figure: Any = figures.lines([panel("loss", 9)], [], (0, last), LIGHT)
    assert list(figure.layout.xaxis.tickvals) == list(range(last + 1))


@pytest.mark.parametrize("values", [[1e308, -1e308], [5e-324, 1e-320], [3e38, 1e-45], [1e308, 1.0]])
@pytest.mark.parametrize("log", [False, True])
def test_any_value_has_a_place(values: list[float], log: bool) -> None:
    """Oracle: planted fault (the largest and the smallest numbers there are)."""
    figure: Any = figures.lines([strip(values, log=log)], [], (0, 1), LIGHT)
    assert np.isfinite(figure.layout.yaxis.range).all()
    assert len(figure.layout.yaxis.ticktext) > 0


def test_map_tells_what_its_colours_mean() -> None:
    """Oracle: definition. The colour of what is not finite is explained where it occurs, and only there."""
    state = np.array([[VALUE, NAN]], dtype=np.int8)
    for shown in (state, np.full((1, 2), VALUE, dtype=np.int8)):
        figure: Any = figures.heat_map(
            Grid(("a",), np.arange(2), 1, np.ones((1, 2)), shown), "t", "", (0, 1), LIGHT, log=False
        )[0]
        assert any("NaN or infinite" in w for w in words(figure)) == bool((shown == NAN).any())


@pytest.mark.parametrize(
    ("whole", "room", "cut"),
    [
        (["mean", "max"], 8, ["mean", "max"]),
        (["layers.0.router", "layers.1.router"], 14, ["…0.router", "…1.router"]),
        (["layers.0.attention.query", "layers.1.attention.query"], 10, ["…0…", "…1…"]),
        (["lr=0.1,wd=0.01", "lr=0.001,wd=0.1"], 12, ["lr=0.1…=0.01", "lr=0.0…d=0.1"]),
        (["tokens.weight", "blocks.0.norm1.weight", "blocks.0.norm2.weight"], 14,
         ["tokens.weight", "….norm1.weight", "….norm2.weight"]),
        (["a" * 30, "a" * 30 + "b"], 9, ["aaaa…aaaa", "aaaa…aaab"]),
        (["\x1b[31m"], 20, [r"\x1b[31m"]),
        (["first.weight", "layers.0.router.weight"], 15, ["first.weight", "layers…weight"]),
    ],
)  # fmt: skip
def test_names_that_fit(whole: list[str], room: int, cut: list[str]) -> None:
    """Oracle: closed form. Short enough, and told apart."""
    assert names.fitted(whole, [room] * len(whole)) == cut
