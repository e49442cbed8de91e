"""Strips of lines over the same steps, one above the other, with findings or phases on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go

from monitor.diagnosis.text import number
from monitor.rule import Severity
from monitor_dashboard.escape import html, html_lines
from monitor_dashboard.figures.axes import limits_of, scale
from monitor_dashboard.figures.names import fitted
from monitor_dashboard.figures.sheet import Sheet, below, fade, template
from monitor_dashboard.sampling import Floats, Line
from monitor_dashboard.theme import Palette

#: Characters of the gutter beside the labels of an axis; a unit longer than `_UNIT` stands once, in the caption.
_ROOM, _UNIT = 26, 8
#: Pixels of a line of the gutter.
_ROW = 15
#: Axis of the findings, beyond those of the panels.
_PINS = "y100"
#: Share of the window below which the numbers of two pins would lie on each other.
_APART = 0.019


@dataclass(frozen=True)
class Envelope:
    """A band between two lines, drawn behind all others; its low and its high edge come from reduced lines."""

    low: Line
    high: Line


@dataclass(frozen=True)
class Mark:
    """A point of the line ``name`` to be seen; ``text`` is what hovering shows. Both are plain text."""

    name: str
    step: int
    value: float
    text: str


@dataclass(frozen=True)
class Panel:
    """One strip of a figure: lines over steps that share a scale.

    Attributes:
        title: name of what is drawn, plain text.
        caption: what that is.
        unit: of its values; "" if they have none.
        lines: name -> line, plain text.
        log: logarithmic scale.
        height: pixels.
        envelope: a band around the first line.
        marks: points of its lines.
    """

    title: str
    caption: str
    unit: str
    lines: dict[str, Line]
    log: bool
    height: int
    envelope: Envelope | None = None
    marks: tuple[Mark, ...] = ()


@dataclass(frozen=True)
class Pin:
    """A finding on the step axis: a band over its steps and a mark at its first.

    Attributes:
        first, last: steps.
        severity: its colour.
        label: the number of its incident if it is the head of one, else "".
        text: what hovering shows, plain text.
    """

    first: int
    last: int
    severity: Severity
    label: str
    text: str


@dataclass(frozen=True)
class Band:
    """A named stretch of steps, first and last inclusive; ``name`` is plain text."""

    name: str
    first: int
    last: int


def lines(
    panels: Sequence[Panel], pins: Sequence[Pin], window: tuple[int, int], p: Palette, *,
    bands: Sequence[Band] = (), log_steps: bool = False,
) -> go.Figure:  # fmt: skip
    """Strips of lines over the same steps, one above the other, with findings pinned above them.

    Args:
        panels: at least one, from the top.
        pins: findings within the window.
        window: first and last visible step.
        p: colours.
        bands: stretches of steps that follow one another, named behind the lines.
        log_steps: logarithmic steps, which show what happened early; step 0 has no place there.
    """
    gap, strip = 16, 22 if pins else 0
    heights = [_height(panel) for panel in panels]
    inner = strip + sum(heights) + gap * (len(panels) - 1)
    if log_steps:
        window = max(1, window[0]), max(1, window[1])
    sheet = Sheet(window, inner, 6 + (22 if bands else 0), p)
    edge = float(inner - strip)
    for i, (panel, height) in enumerate(zip(panels, heights, strict=True), start=1):
        _panel(sheet, panel, "y" if i == 1 else f"y{i}", ((edge - height) / inner, edge / inner), height)
        edge -= height + gap
    if pins:
        _pins(sheet, pins, 1 - strip / inner)
    _bands(sheet, bands, window, log_steps)
    if log_steps:
        first, last = window
        sheet.xaxis |= {"type": "log", "range": [math.log10(first), math.log10(max(last, first + 1))]}
    sheet.xaxis |= {
        "anchor": "y" if len(panels) == 1 else f"y{len(panels)}", "spikemode": "across", "spikethickness": 1,
        "spikedash": "solid", "spikecolor": p.faded,
    }  # fmt: skip
    sheet.layout |= {
        "hovermode": "x unified", "hoversubplots": "axis", "dragmode": "select", "selectdirection": "h",
        "newselection": {"line": {"color": p.faded, "width": 1, "dash": "dot"}},
    }  # fmt: skip
    return sheet.figure()


def _height(panel: Panel) -> int:
    """Pixels of a panel: what it asks for, or what the names of its lines take."""
    rows = len(panel.lines) + any(line.odd for line in panel.lines.values())
    return max(panel.height, below(_caption(panel)) + _ROW * rows)


def _caption(panel: Panel) -> str:
    return f"{panel.caption}, {panel.unit}" if len(panel.unit) > _UNIT else panel.caption


def _panel(sheet: Sheet, panel: Panel, axis: str, domain: tuple[float, float], height: int) -> None:
    p, bottom, top = sheet.p, *domain
    both = [v for line in panel.lines.values() for v in (line.low, line.high)]
    limits = limits_of(both, panel.log)
    if panel.envelope is not None:  # a band that is far wider than the lines would flatten them
        low, high = limits_of([panel.envelope.low.low, panel.envelope.high.high], panel.log)
        more = 0.25 * (limits[1] - limits[0])
        limits = max(min(low, limits[0]), limits[0] - more), min(max(high, limits[1]), limits[1] + more)
    at, words = scale(*limits, log=panel.log, room=max(3, height // 40))
    if panel.envelope is None and not any(np.isfinite(v).any() for v in both):
        at, words = [], []  # a scale of nothing would be made up
        sheet.note((bottom + top) / 2, _nothing(panel))
    kind = "log" if panel.log else "linear"
    sheet.layout[f"yaxis{axis[1:]}"] = sheet.axis(at, words, domain=domain, range=limits, type=kind)
    if panel.envelope is not None:
        _envelope(sheet, panel.envelope, axis, p.lines[0])
    colours = [p.lines[n % len(p.lines)] for n in range(len(panel.lines))]
    for (name, line), colour in zip(panel.lines.items(), colours, strict=True):
        label = template(html(f"{panel.title} {name}", 40))
        _line(sheet, line, label, axis, colour)
        _odd(sheet, line, label, axis, limits, panel.log)
    down = sheet.title(top, panel.title, _caption(panel))
    for n, (text, colour) in enumerate(zip(_names(panel), colours, strict=True)):
        sheet.gutter(top, down + _ROW * n, text, colour, 12)
    if odd := list(dict.fromkeys(kind for line in panel.lines.values() for kind in line.odd)):
        count = sum(line.odd_count for line in panel.lines.values())
        sheet.gutter(top, down + _ROW * len(panel.lines), f"✕ {count:,} {html(', '.join(odd))}", p.broken, 11)

    names = list(panel.lines)
    for mark in panel.marks:
        sheet.line(
            x=[mark.step], y=[mark.value], yaxis=axis, mode="markers",
            marker={
                "symbol": "circle", "size": 9, "color": p.surface,
                "line": {"width": 2, "color": colours[names.index(mark.name)]},
            },
            hovertemplate=f"{template(html_lines(mark.text))}<extra></extra>",
        )  # fmt: skip


def _nothing(panel: Panel) -> str:
    """Why a panel without a line has none."""
    if not any(line.count for line in panel.lines.values()):
        return "nothing recorded in these steps"
    placeless = any("≤ 0" in line.odd for line in panel.lines.values())
    return "no value above 0 in these steps" if placeless else "no finite value in these steps"


def _names(panel: Panel) -> list[str]:
    """A line of HTML for each line: its name, cut so that no two are alike, and its last value."""
    unit = panel.unit if len(panel.unit) <= _UNIT else ""
    values = [number(line.last) if line.count else "–" for line in panel.lines.values()]
    room = [max(8, _ROOM - 3 - len(value) - len(unit)) for value in values]
    names = fitted([*panel.lines], room)
    return [f"{html(n)}  <b>{v}</b> {html(unit)}" for n, v in zip(names, values, strict=True)]


def _envelope(sheet: Sheet, found: Envelope, axis: str, colour: str) -> None:
    both = ~(np.isnan(found.low.low) | np.isnan(found.high.high))
    x, y = _outline(found.low.steps, np.where(both, found.low.low, np.nan), found.high.high)
    sheet.line(
        x=x, y=y, yaxis=axis, mode="lines", fill="toself", fillcolor=fade(colour, 0.13), hoverinfo="skip",
        line={"color": fade(colour, 0.3), "width": 0.5},
    )  # fmt: skip


def _line(sheet: Sheet, line: Line, label: str, axis: str, colour: str) -> None:
    if line.reduced:
        x, y = _outline(line.steps, line.low, line.high)
        # its thin edge keeps one-step extremes visible
        sheet.line(
            x=x, y=y, yaxis=axis, mode="lines", fill="toself", fillcolor=fade(colour, 0.22), hoverinfo="skip",
            line={"color": fade(colour, 0.45), "width": 0.7},
        )  # fmt: skip
        found = zip(line.low, line.mean, line.high, strict=True)
        text = [f"{number(mean)} ({number(low)} … {number(high)})" for low, mean, high in found]
    else:
        text = [number(v) for v in line.mean]
    sheet.line(
        x=line.steps, y=line.mean, yaxis=axis, mode="lines", line={"color": colour, "width": 1.5}, customdata=text,
        hovertemplate=f"{label}  <b>%{{customdata}}</b><extra></extra>",
    )  # fmt: skip
    absent = np.isnan(line.mean)
    alone = ~absent & np.append(True, absent[:-1]) & np.append(absent[1:], True)
    if alone.any():  # a value between two gaps, through which no line runs
        sheet.line(
            x=line.steps[alone], y=line.mean[alone], yaxis=axis, mode="markers", hoverinfo="skip",
            marker={"size": 4, "color": colour},
        )  # fmt: skip


def _outline(steps: Floats, low: Floats, high: Floats) -> tuple[Floats, Floats]:
    """Along the top and back along the bottom, a polygon for each piece between gaps, which are NaN in ``low``."""
    solid = np.flatnonzero(~np.isnan(low))
    x, y = [], []
    for piece in np.split(solid, np.flatnonzero(np.diff(solid) > 1) + 1):
        x += [steps[piece], steps[piece[::-1]], [np.nan]]
        y += [high[piece], low[piece[::-1]], [np.nan]]
    return np.concatenate(x)[:-1], np.concatenate(y)[:-1]


def _odd(sheet: Sheet, line: Line, label: str, axis: str, limits: tuple[float, float], log: bool) -> None:
    """Crosses on the edge of the scale where a value has no place on it."""
    if line.odd:
        at = [limits[0] if kind in ("≤ 0", "-inf") else limits[1] for kind in line.odd]
        sheet.line(
            x=line.odd_steps, y=[10**v for v in at] if log else at, yaxis=axis, mode="markers", cliponaxis=False,
            marker={"symbol": "x-thin", "size": 7, "line": {"width": 1.6, "color": sheet.p.broken}},
            customdata=line.odd, hovertemplate=f"{label} <b>%{{customdata}}</b><extra></extra>",
        )  # fmt: skip


def _pins(sheet: Sheet, pins: Sequence[Pin], bottom: float) -> None:
    p = sheet.p
    # a strip of their own above the lines: a mark on the edge of a scale would be clipped or hide a value
    sheet.layout[f"yaxis{_PINS[1:]}"] = {"domain": [bottom, 1], "range": [0, 1], "fixedrange": True, "visible": False}
    heads = [pin for pin in pins if pin.label]
    over = {"xref": "x", "yref": "paper", "y0": 0, "y1": 1, "layer": "below"}
    for pin in heads:
        colour = p.level[pin.severity]
        band = {"type": "rect", "x0": pin.first, "x1": pin.last, "fillcolor": colour, "opacity": 0.08}
        edge = {"type": "line", "x0": pin.first, "x1": pin.first, "line": {"color": colour, "width": 1, "dash": "dot"}}
        sheet.shapes += [over | band | {"line": {"width": 0}}, over | edge]
    others = [pin for pin in pins if not pin.label]
    numbered = _apart(heads, sheet.xaxis["range"])
    crowded = [pin for pin in heads if pin not in numbered]
    # numbers last, so that they lie on top
    for chosen, look in (
        (others, {"symbol": "triangle-down", "size": 8}),
        (crowded, {"symbol": "circle", "size": 9}),
        (numbered, {"symbol": "circle", "size": 17}),
    ):
        if chosen:
            sheet.line(
                x=[pin.first for pin in chosen], y=[0.5] * len(chosen), yaxis=_PINS, cliponaxis=False,
                mode="markers+text",
                marker={**look, "color": [p.level[pin.severity] for pin in chosen]},
                text=[pin.label if chosen is numbered else "" for pin in chosen],
                textfont={"color": p.surface, "size": 11, "weight": 700},
                customdata=[html_lines(pin.text) for pin in chosen], hovertemplate="%{customdata}<extra></extra>",
            )  # fmt: skip


def _apart(pins: Sequence[Pin], window: Sequence[float]) -> list[Pin]:
    """Those of ``pins`` whose number has room beside the numbers of earlier ones."""
    room = _APART * (window[1] - window[0])
    found: list[Pin] = []
    for pin in pins:
        if all(abs(pin.first - other.first) >= room for other in found):
            found.append(pin)
    return found


def _bands(sheet: Sheet, bands: Sequence[Band], window: tuple[int, int], log_steps: bool) -> None:
    """Stretches of steps behind all lines; a name for which there is no room is left out."""
    p, (first, last) = sheet.p, window
    over = {"xref": "x", "yref": "paper", "y0": 0, "y1": 1, "layer": "below"}
    edge = {"type": "line", "line": {"color": p.faded, "width": 1, "dash": "dot"}}

    def place(step: int) -> float:
        return math.log10(step) if log_steps else step

    for i, band in enumerate(bands):
        # each begins where the one before ended, so that no step lies between two
        low, high = max(band.first, first), min(band.last, last) + 1
        if low >= high:
            continue
        sheet.shapes += [
            over | {"type": "rect", "x0": low, "x1": high, "fillcolor": p.lines[0], "opacity": 0.05 + 0.03 * (i % 2),
                    "line": {"width": 0}},
            over | edge | {"x0": low, "x1": low},
        ]  # fmt: skip
        share = (place(high) - place(low)) / (place(last + 1) - place(first))
        if 900 * share > 6 * len(band.name):  # on a chart of 900 pixels
            sheet.annotations.append({
                "xref": "x", "yref": "paper", "x": place(low), "y": 1, "yshift": 18, "xanchor": "left",
                "yanchor": "top", "text": html(band.name, 20), "showarrow": False, "borderpad": 2,
                "font": {"size": 11, "color": p.faded},
            })  # fmt: skip
