"""Lines and maps as plotly figures; the only file that imports plotly.

All figures of a page share one geometry, so that a step stands at the same place in each: a gutter of `GUTTER` pixels
at the left holds names and last values, and the visible steps are given explicitly, because a zoom that plotly keeps by
itself is lost when the data change. Dragging selects steps; what follows from it is the page's business.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from monitor.diagnosis.text import number
from monitor.rule import Severity
from monitor_dashboard.escape import html, html_lines
from monitor_dashboard.sampling import INF, MISSING, NAN, VALUE, Floats, Grid, Line
from monitor_dashboard.theme import Palette

GUTTER, RIGHT = 196, 14
_AXIS = 34
_FONT = '"Source Sans", sans-serif'
#: Characters of the gutter beside the labels of an axis; a unit longer than `_UNIT` stands once, in the caption.
_ROOM, _UNIT = 26, 8
#: Rows of the map of spectral densities.
_CELLS = 75
#: What every chart is given: the tool bar would offer a second zoom, which does not survive new data.
CONFIG: dict[str, Any] = {"displayModeBar": False, "responsive": True, "scrollZoom": False}


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


@dataclass(frozen=True)
class Heads:
    """One value of each head of attention at one step.

    Attributes:
        layers: names of the rows, plain text.
        values: ``(layer, head)``.
        state: ``(layer, head)`` of `monitor_dashboard.sampling`: which of them are values, NaN, infinite or missing.
    """

    layers: tuple[str, ...]
    values: Floats
    state: np.ndarray[Any, np.dtype[np.int8]]


@dataclass(frozen=True)
class Spectra:
    """Spectral densities at several steps, as weighted nodes; every array is ``(node,)``, of all steps together.

    Attributes:
        steps: where each was measured.
        nodes: eigenvalues.
        weights: a node's share of all eigenvalues of its step.
    """

    steps: Floats
    nodes: Floats
    weights: Floats


class _Sheet:
    """A figure as plain data, made into a plotly figure once: its own update methods take four times as long.

    Args:
        window: first and last visible step.
        height: pixels between the top margin and the step axis.
        top: pixels of the top margin.
        p: colours.
    """

    def __init__(self, window: tuple[int, int], height: int, top: int, p: Palette) -> None:
        first, last = window
        pad = max((last - first) * 0.005, 0.5)
        self.p = p
        self.traces: list[dict[str, Any]] = []
        self.shapes: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self.xaxis: dict[str, Any] = {
            "range": [first - pad, last + pad], "fixedrange": True, "showgrid": False, "zeroline": False,
            "tickformat": ",d", "tickfont": {"size": 11, "color": p.faded}, "nticks": 9, "ticks": "outside",
            "ticklen": 4, "tickcolor": p.border, "showline": True, "linecolor": p.border,
            "unifiedhovertitle": {"text": "<b>step %{x:,d}</b>"},
        }  # fmt: skip
        self.layout: dict[str, Any] = {
            "height": height + top + _AXIS,
            "margin": {"l": GUTTER, "r": RIGHT, "t": top, "b": _AXIS, "autoexpand": False},
            "paper_bgcolor": p.surface, "plot_bgcolor": p.surface, "showlegend": False,
            "font": {"family": _FONT, "color": p.text, "size": 12},
            "hoverlabel": {
                "bgcolor": p.panel, "bordercolor": p.border, "align": "left",
                "font": {"family": _FONT, "size": 12, "color": p.text},
            },
        }  # fmt: skip

    def line(self, **trace: Any) -> None:
        """Add a scatter trace over steps."""
        self.traces.append({"type": "scatter", "xaxis": "x", **trace})

    def gutter(self, y: float, down: int, text: str, colour: str, size: int) -> None:
        """Write HTML into the gutter, ``down`` pixels below ``y`` of the figure's height."""
        self.annotations.append({
            "xref": "paper", "yref": "paper", "x": 0, "y": y, "xshift": -GUTTER, "yshift": -down, "xanchor": "left",
            "yanchor": "top", "text": text, "showarrow": False, "align": "left", "borderpad": 0,
            "font": {"size": size, "color": colour},
        })  # fmt: skip

    def figure(self) -> go.Figure:
        """The finished figure."""
        drawn = {"xaxis": self.xaxis, "shapes": self.shapes, "annotations": self.annotations}
        return go.Figure(data=self.traces, layout=self.layout | drawn)


def lines(panels: Sequence[Panel], pins: Sequence[Pin], window: tuple[int, int], p: Palette) -> go.Figure:
    """Strips of lines over the same steps, one above the other, with findings pinned above them.

    Args:
        panels: at least one, from the top.
        pins: findings within the window.
        window: first and last visible step.
        p: colours.
    """
    gap, strip = 16, 22 if pins else 0
    inner = strip + sum(panel.height for panel in panels) + gap * (len(panels) - 1)
    sheet = _Sheet(window, inner, 6, p)
    edge = float(inner - strip)
    for i, panel in enumerate(panels, start=1):
        _panel(sheet, panel, "y" if i == 1 else f"y{i}", ((edge - panel.height) / inner, edge / inner))
        edge -= panel.height + gap
    if pins:
        _pins(sheet, pins, 1 - strip / inner)
    sheet.xaxis |= {
        "anchor": "y" if len(panels) == 1 else f"y{len(panels)}", "spikemode": "across", "spikethickness": 1,
        "spikedash": "solid", "spikecolor": p.faded,
    }  # fmt: skip
    sheet.layout |= {
        "hovermode": "x unified", "hoversubplots": "axis", "dragmode": "select", "selectdirection": "h",
        "newselection": {"line": {"color": p.faded, "width": 1, "dash": "dot"}},
    }  # fmt: skip
    return sheet.figure()


def _panel(sheet: _Sheet, panel: Panel, axis: str, domain: tuple[float, float]) -> None:
    p = sheet.p
    limits = _range([v for line in panel.lines.values() for v in (line.low, line.high)], panel.log)
    if panel.envelope is not None:  # a band that is far wider than the lines would flatten them
        low, high = _range([panel.envelope.low.low, panel.envelope.high.high], panel.log)
        more = 0.25 * (limits[1] - limits[0])
        limits = max(min(low, limits[0]), limits[0] - more), min(max(high, limits[1]), limits[1] + more)
    at, words = scale(*limits, log=panel.log, room=max(3, panel.height // 40))
    sheet.layout[f"yaxis{axis[1:]}"] = {
        "domain": domain, "range": limits, "type": "log" if panel.log else "linear", "fixedrange": True,
        "gridcolor": p.border, "zeroline": False, "tickvals": at, "ticktext": words,
        "tickfont": {"size": 11, "color": p.faded}, "ticklabelstandoff": 4,
    }  # fmt: skip
    top = domain[1]
    unit = panel.unit if len(panel.unit) <= _UNIT else ""
    caption = html_lines(panel.caption if unit == panel.unit else f"{panel.caption}, {panel.unit}", 27)
    below = 34 + 13 * caption.count("<br>")
    sheet.gutter(top, 0, f"<b>{html(panel.title, 24)}</b>", p.text, 13)
    sheet.gutter(top, 17, caption, p.faded, 11)
    if panel.envelope is not None:
        _envelope(sheet, panel.envelope, axis, p.lines[0])
    for n, (name, line) in enumerate(panel.lines.items()):
        colour = p.lines[n % len(p.lines)]
        label = _template(html(f"{panel.title} {name}", 40))
        _line(sheet, line, label, axis, colour)
        _odd(sheet, line, label, axis, limits, panel.log)
        value = number(line.last) if line.count else "–"
        row = f"{html(name, max(8, _ROOM - 3 - len(value) - len(unit)))}  <b>{value}</b> {html(unit)}"
        if below + 15 * n < panel.height - 10:
            sheet.gutter(top, below + 15 * n, row, colour, 12)

    names = list(panel.lines)
    for mark in panel.marks:
        sheet.line(
            x=[mark.step], y=[mark.value], yaxis=axis, mode="markers",
            marker={
                "symbol": "circle", "size": 9, "color": p.surface,
                "line": {"width": 2, "color": p.lines[names.index(mark.name) % len(p.lines)]},
            },
            hovertemplate=f"{_template(html_lines(mark.text))}<extra></extra>",
        )  # fmt: skip


def _envelope(sheet: _Sheet, found: Envelope, axis: str, colour: str) -> None:
    both = ~(np.isnan(found.low.low) | np.isnan(found.high.high))
    x, y = _outline(found.low.steps, np.where(both, found.low.low, np.nan), found.high.high)
    sheet.line(
        x=x, y=y, yaxis=axis, mode="lines", fill="toself", fillcolor=_fade(colour, 0.13), hoverinfo="skip",
        line={"color": _fade(colour, 0.3), "width": 0.5},
    )  # fmt: skip


def _line(sheet: _Sheet, line: Line, label: str, axis: str, colour: str) -> None:
    if line.reduced:
        x, y = _outline(line.steps, line.low, line.high)
        # its thin edge keeps one-step extremes visible
        sheet.line(
            x=x, y=y, yaxis=axis, mode="lines", fill="toself", fillcolor=_fade(colour, 0.22), hoverinfo="skip",
            line={"color": _fade(colour, 0.45), "width": 0.7},
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


def _odd(sheet: _Sheet, line: Line, label: str, axis: str, limits: tuple[float, float], log: bool) -> None:
    """Crosses on the edge of the scale where a value has no place on it."""
    if line.odd:
        at = [limits[0] if kind in ("≤ 0", "-inf") else limits[1] for kind in line.odd]
        sheet.line(
            x=line.odd_steps, y=[10**v for v in at] if log else at, yaxis=axis, mode="markers", cliponaxis=False,
            marker={"symbol": "x-thin", "size": 7, "line": {"width": 1.6, "color": sheet.p.broken}},
            customdata=line.odd, hovertemplate=f"{label} <b>%{{customdata}}</b><extra></extra>",
        )  # fmt: skip


def _pins(sheet: _Sheet, pins: Sequence[Pin], bottom: float) -> None:
    p = sheet.p
    # a strip of their own above the lines: a mark on the edge of a scale would be clipped or hide a value
    sheet.layout["yaxis20"] = {"domain": [bottom, 1], "range": [0, 1], "fixedrange": True, "visible": False}
    heads = [pin for pin in pins if pin.label]
    over = {"xref": "x", "yref": "paper", "y0": 0, "y1": 1, "layer": "below"}
    for pin in heads:
        colour = p.level[pin.severity]
        band = {"type": "rect", "x0": pin.first, "x1": pin.last, "fillcolor": colour, "opacity": 0.08}
        edge = {"type": "line", "x0": pin.first, "x1": pin.first, "line": {"color": colour, "width": 1, "dash": "dot"}}
        sheet.shapes += [over | band | {"line": {"width": 0}}, over | edge]
    others = [pin for pin in pins if not pin.label]
    # heads last, so that they lie on top
    for chosen, look in ((others, {"symbol": "triangle-down", "size": 8}), (heads, {"symbol": "circle", "size": 17})):
        if chosen:
            sheet.line(
                x=[pin.first for pin in chosen], y=[0.5] * len(chosen), yaxis="y20", mode="markers+text",
                marker={**look, "color": [p.level[pin.severity] for pin in chosen]},
                text=[pin.label for pin in chosen], textfont={"color": p.surface, "size": 11, "weight": 700},
                customdata=[html_lines(pin.text) for pin in chosen], hovertemplate="%{customdata}<extra></extra>",
            )  # fmt: skip


def phases(
    panels: Sequence[Panel], bands: Sequence[Band], window: tuple[int, int], p: Palette, *, log_steps: bool
) -> go.Figure:
    """Strips of lines as in `lines`, with named stretches of steps behind all of them.

    Args:
        panels: at least one, from the top.
        bands: stretches that follow one another.
        window: first and last step.
        p: colours.
        log_steps: logarithmic steps, which show what happened early; step 0 has no place there.
    """
    figure: Any = lines(panels, [], window, p)
    first, last = (max(1, step) for step in window)
    room = 22 if bands else 0
    figure.layout.margin.t += room
    figure.layout.height += room
    figure.layout.dragmode = False
    if log_steps:
        figure.layout.xaxis.type = "log"
        figure.layout.xaxis.range = [math.log10(first), math.log10(max(last, first + 1))]
    shapes, names = list(figure.layout.shapes), list(figure.layout.annotations)
    width = (math.log10(last) - math.log10(first)) if log_steps else window[1] - window[0]
    for i, band in enumerate(bands):
        # each begins where the one before ended, so that no step lies between two
        low, high = (max(x, first) if log_steps else x for x in (band.first, band.last + 1))
        over = {"xref": "x", "yref": "paper", "y0": 0, "y1": 1, "layer": "below"}
        shapes.append(over | {
            "type": "rect", "x0": low, "x1": high, "fillcolor": p.lines[0], "opacity": 0.05 + 0.03 * (i % 2),
            "line": {"width": 0},
        })  # fmt: skip
        shapes.append(over | {
            "type": "line", "x0": low, "x1": low, "line": {"color": p.faded, "width": 1, "dash": "dot"},
        })  # fmt: skip
        a, b = (math.log10(x) if log_steps else x for x in (low, high))
        if (b - a) * 900 > 6 * len(band.name) * width:  # room for the name on a chart of 900 pixels
            names.append({
                "xref": "x", "yref": "paper", "x": a, "y": 1, "yshift": 18, "xanchor": "left", "yanchor": "top",
                "text": html(band.name, 20), "showarrow": False, "borderpad": 2,
                "font": {"size": 11, "color": p.faded},
            })  # fmt: skip
    figure.layout.shapes, figure.layout.annotations = shapes, names
    return figure


def head_map(heads: Heads, caption: str, selected: str, p: Palette, *, log: bool) -> tuple[go.Figure, list[str]]:
    """Layers × heads of attention, coloured by the value of each; non-finite cells have a colour of their own.

    Args:
        heads: what to draw.
        caption: what is drawn, plain text.
        selected: module of the head to frame.
        p: colours.
        log: as in `heat_map`.

    Returns:
        The figure, and the module of each of its points that can be clicked, by number.
    """
    layers, widest = heads.state.shape
    height = int(np.clip(layers * 30, 60, 480))
    shade = np.where(heads.state == VALUE, heads.values, np.nan)
    low, high = _span(np.log10(shade[shade > 0]) if log else shade)
    if log:
        with np.errstate(divide="ignore", invalid="ignore"):
            shade = np.where(shade > 0, np.log10(shade), np.where(heads.state == VALUE, low, np.nan))
    sheet = _Sheet((0, widest - 1), height, 32, p)
    shared = {
        "type": "heatmap",
        "x": np.arange(widest),
        "y": np.arange(layers),
        "hoverinfo": "skip",
        "xgap": 1,
        "ygap": 1,
    }
    ticks, words = _ticks(low, high, log)
    told = [[number(v) if s != MISSING else "" for v, s in zip(*row, strict=True)]
            for row in zip(heads.values, heads.state, strict=True)]  # fmt: skip
    written = {"text": told, "texttemplate": "%{text}", "textfont": {"size": 11}}
    sheet.traces += [
        shared | {
            "z": shade.astype(np.float32), "zmin": low, "zmax": high,
            "colorscale": [[i / (len(p.scale) - 1), colour] for i, colour in enumerate(p.scale)],
            "colorbar": {
                "orientation": "h", "thickness": 6, "len": 0.3, "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom",
                "tickvals": ticks, "ticktext": words, "tickfont": {"size": 10, "color": p.faded}, "outlinewidth": 0,
                "ypad": 8, "xpad": 0, "ticklabelposition": "outside top",
            },
        }
        | (written if widest <= 16 and layers <= 24 else {}),
        shared | {
            "z": np.where(heads.state >= NAN, 1.0, np.nan).astype(np.float32), "zmin": 0, "zmax": 1,
            "colorscale": [[0, p.broken], [1, p.broken]], "showscale": False,
        },
    ]  # fmt: skip
    rows, columns = np.nonzero(heads.state != MISSING)
    modules = [f"{heads.layers[i]}[{j}]" for i, j in zip(rows, columns, strict=True)]
    # as in heat_map: a click is reported for a point only
    sheet.line(
        x=columns, y=rows, mode="markers", marker={"color": "rgba(0,0,0,0)", "size": 24},
        customdata=[[_template(html(m, 70)), told[i][j]] for m, i, j in zip(modules, rows, columns, strict=True)],
        hovertemplate="<b>%{customdata[0]}</b><br>%{customdata[1]}<extra></extra>",
    )  # fmt: skip
    if selected in modules:
        i, j = rows[modules.index(selected)], columns[modules.index(selected)]
        sheet.shapes.append({
            "type": "rect", "x0": j - 0.5, "x1": j + 0.5, "y0": i - 0.5, "y1": i + 0.5,
            "line": {"color": p.text, "width": 1.6},
        })  # fmt: skip
    every = max(1, -(-layers * 12 // height))
    sheet.layout["yaxis"] = {
        "range": [layers - 0.5, -0.5], "tickvals": np.arange(layers)[::every], "fixedrange": True,
        "ticktext": [html(name, 28) for name in heads.layers][::every], "showgrid": False, "ticks": "",
        "zeroline": False, "tickfont": {"size": 11, "color": p.text}, "ticklabelstandoff": 4,
    }  # fmt: skip
    sheet.xaxis |= {"range": [-0.5, widest - 0.5], "tickprefix": "head ", "dtick": max(1, -(-widest // 16)), "tick0": 0}
    sheet.gutter(1, -22, html(caption, 36), p.faded, 11)
    sheet.layout |= {"hovermode": "closest", "hoverdistance": -1, "dragmode": False}
    return sheet.figure(), modules


def heat_map(
    grid: Grid, caption: str, selected: str, window: tuple[int, int], p: Palette, *, log: bool
) -> tuple[go.Figure, list[str]]:
    """Modules × steps, coloured by the largest value of each cell; non-finite cells have a colour of their own.

    Args:
        grid: what to draw.
        caption: what is drawn, plain text.
        selected: module to frame.
        window: first and last visible step.
        p: colours.
        log: colours are spread over the logarithm; what is not above 0 has the lowest one and shows its value when
            hovered.

    Returns:
        The figure, and the module of each of its curves by number ("" where a curve is no module).
    """
    rows = len(grid.modules)
    height = int(np.clip(rows * 16, 64, 300))
    middle = grid.starts + (grid.width - 1) / 2
    y = np.arange(rows)
    shade = np.where(grid.state == VALUE, grid.values, np.nan)
    low, high = _span(np.log10(shade[shade > 0]) if log else shade)
    if log:
        with np.errstate(divide="ignore", invalid="ignore"):
            shade = np.where(shade > 0, np.log10(shade), np.where(grid.state == VALUE, low, np.nan))
    sheet = _Sheet(window, height, 32, p)
    shared = {"type": "heatmap", "x": middle, "y": y, "hoverinfo": "skip"}
    ticks, words = _ticks(low, high, log)
    sheet.traces += [
        shared | {
            "z": shade.astype(np.float32), "zmin": low, "zmax": high,
            "colorscale": [[i / (len(p.scale) - 1), colour] for i, colour in enumerate(p.scale)],
            "colorbar": {
                "orientation": "h", "thickness": 6, "len": 0.3, "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom",
                "tickvals": ticks, "ticktext": words, "tickfont": {"size": 10, "color": p.faded}, "outlinewidth": 0,
                "ypad": 8, "xpad": 0, "ticklabelposition": "outside top",
            },
        },
        shared | {
            "z": np.where(grid.state >= NAN, 1.0, np.nan).astype(np.float32), "zmin": 0, "zmax": 1,
            "colorscale": [[0, p.broken], [1, p.broken]], "showscale": False,
        },
    ]  # fmt: skip
    curves = ["", ""]
    where = "step %{x:,d}" if grid.width == 1 else f"largest of {grid.width:,} steps around %{{x:,.0f}}"
    # plotly reports clicks on points only, never on a map: an invisible point in every cell also carries the label
    for row, module in enumerate(grid.modules):
        cells = grid.state[row] != MISSING
        value = np.where(grid.state[row] == NAN, np.nan, np.where(grid.state[row] == INF, np.inf, grid.values[row]))
        sheet.line(
            x=middle[cells], y=np.full(int(cells.sum()), row, np.int16), mode="markers",
            marker={"color": "rgba(0,0,0,0)", "size": 1, "maxdisplayed": 1}, customdata=value[cells].astype(np.float32),
            hovertemplate=f"<b>{_template(html(module, 70))}</b><br>%{{customdata:.2e}} · {where}<extra></extra>",
        )  # fmt: skip
        curves.append(module)
    if selected in grid.modules:
        at = grid.modules.index(selected)
        if height >= 8 * rows:
            edge = {"line": {"color": p.text, "width": 1.2}}
            sheet.shapes.append(
                {"type": "rect", "xref": "paper", "x0": 0, "x1": 1, "y0": at - 0.5, "y1": at + 0.5} | edge
            )
        else:  # a frame would hide so low a row
            sheet.annotations.append({
                "xref": "paper", "x": 1, "y": at, "text": "◂", "showarrow": False, "xanchor": "left", "borderpad": 0,
                "font": {"size": 14, "color": p.text},
            })  # fmt: skip
    every = -(-rows * 11 // height)
    labels = [html(label, 32) for label in short_names(grid.modules)]
    sheet.layout["yaxis"] = {
        "range": [rows - 0.5, -0.5], "tickvals": y[::every], "ticktext": labels[::every], "fixedrange": True,
        "tickfont": {"size": 11 if rows * 14 <= height else 10, "color": p.text}, "showgrid": False, "zeroline": False,
        "ticks": "", "ticklabelstandoff": 4,
    }  # fmt: skip
    sheet.gutter(1, -22, html(caption, 36), p.faded, 11)
    sheet.layout |= {"hovermode": "closest", "hoverdistance": -1}
    return sheet.figure(), curves


def spectra(found: Spectra, caption: str, unit: str, window: tuple[int, int], p: Palette) -> go.Figure:
    """Spectral densities over steps: the share of all eigenvalues in each cell, coloured by its logarithm.

    The scale is linear up to a ten-thousandth of the largest node and logarithmic beyond, on both sides of zero. A
    column is as wide as the step at which the next one was measured is away; the nodes themselves are told on hovering.

    Args:
        found: at least one node.
        caption: what is drawn, plain text.
        unit: of the nodes.
        window: first and last visible step.
        p: colours.
    """
    height = 300
    sheet = _Sheet(window, height, 32, p)
    largest = float(np.abs(found.nodes).max()) or 1.0
    unit_height = 1e-4 * largest

    def up(x: Floats) -> Floats:
        return np.sign(x) * np.log10(1 + np.abs(x) / unit_height)

    lowest, highest = up(np.array([min(0.0, found.nodes.min()), max(0.0, found.nodes.max())])).tolist()
    ends = lowest - 0.25, highest + 0.25
    measured, column = np.unique(found.steps, return_inverse=True)
    width = float(np.median(np.diff(measured))) if len(measured) > 1 else max(1.0, 0.05 * (window[1] - window[0]))
    rows = np.linspace(*ends, _CELLS + 1)
    row = np.clip(np.searchsorted(rows, up(found.nodes), side="right") - 1, 0, _CELLS - 1)
    share = np.zeros((_CELLS, len(measured)))
    np.add.at(share, (row, column), found.weights)
    shade = np.log10(np.where(share > 0, np.maximum(share, 1e-12), np.nan))
    low, high = _span(shade)
    ticks, words = _ticks(low, high, log=True)
    colours = p.scale[2:]  # a single outlier must be seen, however little it weighs
    sheet.traces.append({
        "type": "heatmap", "x": np.append(measured, measured[-1] + width), "y": rows, "z": shade.astype(np.float32),
        "zmin": low, "zmax": high, "hoverinfo": "skip",
        "colorscale": [[i / (len(colours) - 1), colour] for i, colour in enumerate(colours)],
        "colorbar": {
            "orientation": "h", "thickness": 6, "len": 0.3, "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom",
            "tickvals": ticks, "ticktext": words, "tickfont": {"size": 10, "color": p.faded}, "outlinewidth": 0,
            "ypad": 8, "xpad": 0, "ticklabelposition": "outside top",
        },
    })  # fmt: skip
    told = [f"{number(x)} · share {number(w)}" for x, w in zip(found.nodes, found.weights, strict=True)]
    sheet.line(
        x=found.steps, y=up(found.nodes), mode="markers", customdata=told,
        marker={"symbol": "square", "size": 5, "color": "rgba(0,0,0,0)"},
        hovertemplate="step %{x:,d}  <b>%{customdata}</b><extra></extra>",
    )  # fmt: skip
    top = math.floor(math.log10(largest))
    powers = [10.0**k for k in range(top - 3, top + 1)]
    labels = np.array([*(-v for v in powers[::-1]), 0.0, *powers])
    labels = labels[(labels >= min(0.0, found.nodes.min())) & (labels <= max(0.0, found.nodes.max()))]
    sheet.layout["yaxis"] = {
        "range": ends, "tickvals": up(labels), "ticktext": [number(v) for v in labels],
        "fixedrange": True, "gridcolor": p.border, "zeroline": True, "zerolinecolor": p.faded, "zerolinewidth": 1,
        "ticks": "", "tickfont": {"size": 11, "color": p.faded}, "ticklabelstandoff": 4,
    }  # fmt: skip
    words_below = html_lines(caption, 27)
    sheet.gutter(1, 0, "<b>spectral_density</b>", p.text, 13)
    sheet.gutter(1, 17, words_below, p.faded, 11)
    sheet.gutter(1, 34 + 13 * words_below.count("<br>"), html(unit, 24), p.faded, 11)
    sheet.layout |= {"hovermode": "closest", "hoverdistance": -1, "dragmode": False}
    return sheet.figure()


def landscape(first: Floats, second: Floats, loss: Floats, caption: str, p: Palette) -> go.Figure:
    """The loss around the weights along two directions, as levels; the cross is where the weights are.

    Args:
        first: distances along the first direction, ``(m,)``, ascending.
        second: along the second, ``(n,)``, ascending.
        loss: ``(m, n)``; NaN and infinities are left blank.
        caption: what is drawn, plain text.
        p: colours.
    """
    sheet = _Sheet((0, 1), 300, 32, p)
    values = np.where(np.isfinite(loss), loss, np.nan)
    low, high = _span(values)
    ticks, words = scale(low, high, log=False, room=4)
    sheet.traces.append({
        "type": "contour", "x": first, "y": second, "z": values.T, "ncontours": 24, "connectgaps": False,
        "line": {"width": 0.5, "color": p.faded},
        "colorscale": [[i / (len(p.scale) - 1), colour] for i, colour in enumerate(p.scale)],
        "hovertemplate": "%{x:.3g} along the first, %{y:.3g} along the second<br>loss <b>%{z:.4g}</b><extra></extra>",
        "colorbar": {
            "orientation": "h", "thickness": 6, "len": 0.3, "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom",
            "tickvals": ticks, "ticktext": words, "tickfont": {"size": 10, "color": p.faded}, "outlinewidth": 0,
            "ypad": 8, "xpad": 0, "ticklabelposition": "outside top",
        },
    })  # fmt: skip
    sheet.line(
        x=[0], y=[0], mode="markers", hoverinfo="skip",
        marker={"symbol": "cross-thin", "size": 10, "line": {"width": 2, "color": p.text}},
    )  # fmt: skip
    ends = float(first[0]), float(first[-1])
    at, words = scale(*ends, log=False, room=8)
    sheet.xaxis |= {"type": "linear", "range": ends, "tickvals": at, "ticktext": words}
    ends = float(second[0]), float(second[-1])
    at, words = scale(*ends, log=False, room=6)
    sheet.layout["yaxis"] = {
        "range": ends, "tickvals": at, "ticktext": words, "fixedrange": True, "ticks": "",
        "tickfont": {"size": 11, "color": p.faded}, "ticklabelstandoff": 4,
    }  # fmt: skip
    sheet.gutter(1, 0, "<b>landscape</b>", p.text, 13)
    sheet.gutter(1, 17, html_lines(caption, 27), p.faded, 11)
    sheet.layout |= {"hovermode": "closest", "dragmode": False}
    return sheet.figure()


def sweep(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], caption: str, p: Palette) -> go.Figure:
    """Final losses over learning rates, a curve for each size of model, both scales logarithmic where they can be.

    Args:
        curves: name -> learning rates, ascending and above 0, and the loss at each.
        caption: what is drawn, plain text.
        p: colours.
    """
    rates = np.log10(np.concatenate([np.asarray(x, dtype=np.float64) for x, _ in curves.values()]))
    losses = np.concatenate([np.asarray(y, dtype=np.float64) for _, y in curves.values()])
    log = bool((losses > 0).all())
    height = max(130, 64 + 15 * len(curves))
    sheet = _Sheet((0, 1), height, 8, p)
    low, high = float(rates.min()) - 0.1, float(rates.max()) + 0.1
    at, words = scale(low, high, log=True, room=8)
    sheet.xaxis |= {"type": "log", "range": [low, high], "tickvals": at, "ticktext": words}
    limits = _range([losses], log)
    at, words = scale(*limits, log=log, room=max(3, height // 40))
    sheet.layout["yaxis"] = {
        "range": limits, "type": "log" if log else "linear", "fixedrange": True, "gridcolor": p.border,
        "zeroline": False, "tickvals": at, "ticktext": words, "tickfont": {"size": 11, "color": p.faded},
        "ticklabelstandoff": 4,
    }  # fmt: skip
    below = html_lines(caption, 27)
    sheet.gutter(1, 0, "<b>sweep</b>", p.text, 13)
    sheet.gutter(1, 17, below, p.faded, 11)
    for n, (name, (x, y)) in enumerate(curves.items()):
        colour = p.lines[n % len(p.lines)]
        told = [f"{html(name, 40)}  lr {rate:g}  <b>{number(loss)}</b>" for rate, loss in zip(x, y, strict=True)]
        best = int(np.argmin(y))
        sheet.line(
            x=list(x), y=list(y), mode="lines+markers", line={"color": colour, "width": 1.5}, customdata=told,
            marker={"size": [10 if i == best else 5 for i in range(len(told))], "color": colour},
            hovertemplate="%{customdata}<extra></extra>",
        )  # fmt: skip
        if len(curves) > 1:
            sheet.gutter(1, 34 + 13 * below.count("<br>") + 15 * n, html(name, 26), colour, 12)
    sheet.layout |= {"hovermode": "closest", "dragmode": False}
    return sheet.figure()


def _ticks(low: float, high: float, log: bool) -> tuple[list[float], list[str]]:
    """Where a colour bar has labels, and which: up to four powers of ten, or its ends."""
    first, last = math.ceil(low), math.floor(high)
    if not log or last - first < 1:
        edge = 1e-4 * (high - low)  # a label right on the end is left out
        return [low + edge, high - edge], [number(float(f"{10**v if log else v:.2g}")) for v in (low, high)]
    powers = range(first, last + 1, -(-(last - first) // 3))
    return [float(v) for v in powers], [f"1e{v}" for v in powers]


def scale(low: float, high: float, *, log: bool, room: int) -> tuple[list[float], list[str]]:
    """Where an axis has labels, and which: at least two round numbers, about ``room`` of them, all written alike.

    Args:
        low: lower limit of the axis, its exponent of ten if ``log``.
        high: upper limit, likewise.
        log: logarithmic axis.
        room: labels that fit.
    """
    if not log:
        step = _round_up((high - low) / room)
        while (last := math.floor(high / step + 1e-9)) <= (first := math.ceil(low / step - 1e-9)):
            step = _round_up(0.4 * step)
        values = [float(f"{i * step:.12g}") for i in range(first, last + 1)]
        return values, [_label(v, step, max(map(abs, values), default=0.0)) for v in values]
    first, last = math.ceil(low), math.floor(high)
    if last - first >= 1:
        powers = range(first, last + 1, -(-(last - first) // room))
        return [10.0**k for k in powers], [f"{10.0**k:,g}" if -4 < k < 5 else f"1e{k}" for k in powers]
    for factors in ((1, 2, 5), (1, 3)):
        values = [float(f"{f}e{k}") for k in range(first - 1, last + 1) for f in factors]
        values = [v for v in values if low <= math.log10(v) <= high]
        if 2 <= len(values) <= room + 1:
            return values, [_label(v, v, max(values)) for v in values]
    return scale(10.0**low, 10.0**high, log=False, room=room)  # less than a factor of three


def _round_up(x: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is at least ``x``."""
    power = 10.0 ** math.floor(math.log10(x))
    return next((f * power for f in (1, 2, 5) if f * power >= x * (1 - 1e-9)), 10 * power)


def _label(value: float, step: float, largest: float) -> str:
    """A number of an axis whose neighbours are ``step`` away and whose largest is ``largest``."""
    if not value:
        return "0"
    place = math.floor(math.log10(step) + 1e-9)  # of the last digit that tells neighbours apart
    if 1e-3 <= largest < 1e5:
        return f"{value:,.{max(0, -place)}f}"
    mantissa, _, exponent = f"{value:.{max(0, math.floor(math.log10(abs(value)) + 1e-9) - place)}e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def short_names(names: Sequence[str]) -> list[str]:
    """``names`` without the dotted prefix that all of them share, which is replaced by "…"."""
    parts = [name.split(".") for name in names]
    shared = 0
    while len(names) > 1 and all(len(part) > shared + 1 and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    return ["…" * bool(shared) + ".".join(part[shared:]) for part in parts]


def _range(values: Sequence[Floats], log: bool) -> tuple[float, float]:
    """Limits of a scale that hold every finite value; exponents of ten on a log scale."""
    stacked = np.concatenate([np.asarray(v) for v in values]) if values else np.zeros(0)
    stacked = np.log10(stacked[stacked > 0]) if log else stacked[np.isfinite(stacked)]
    low, high = _span(stacked)
    pad = 0.06 * (high - low)
    return low - pad, high + pad


def _span(values: Floats) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    if not low and not high:
        return 0.0, 1.0
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-300):
        spread = abs(low) * 0.1
        return low - spread, high + spread
    return low, high


def _template(text: str) -> str:
    """``text`` inside a hover template, where ``%{`` would begin a field."""
    return text.replace("%", "&#37;")


def _fade(colour: str, alpha: float) -> str:
    digits = colour[1:] if len(colour) == 7 else "".join(c * 2 for c in colour[1:])
    red, green, blue = (int(digits[i : i + 2], 16) for i in (0, 2, 4))
    return f"rgba({red},{green},{blue},{alpha})"
