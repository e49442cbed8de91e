"""Lines and maps as plotly figures; the only file that imports plotly.

All figures of a page share one geometry, so that a step stands at the same place in each: a gutter of `GUTTER` pixels
at the left holds names and last values, and the visible steps are given explicitly, because a zoom that plotly keeps by
itself is lost when the data change. Dragging selects steps; what follows from it is the page's business.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
#: What every chart is given: the tool bar would offer a second zoom, which does not survive new data.
CONFIG: dict[str, Any] = {"displayModeBar": False, "responsive": True, "scrollZoom": False}


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
    """

    title: str
    caption: str
    unit: str
    lines: dict[str, Line]
    log: bool
    height: int


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


def lines(panels: Sequence[Panel], pins: Sequence[Pin], window: tuple[int, int], p: Palette) -> go.Figure:
    """Strips of lines over the same steps, one above the other, with findings pinned to the first.

    Args:
        panels: at least one, from the top.
        pins: findings within the window.
        window: first and last visible step.
        p: colours.
    """
    figure = go.Figure()
    gap, strip = 16, 22 if pins else 0
    inner = strip + sum(panel.height for panel in panels) + gap * (len(panels) - 1)
    edge = float(inner - strip)
    for i, panel in enumerate(panels, start=1):
        domain = ((edge - panel.height) / inner, edge / inner)
        edge -= panel.height + gap
        _panel(figure, panel, i, domain, p)
    for pin in pins:
        colour = p.level[pin.severity]
        if pin.label:
            figure.add_shape(
                type="rect", xref="x", yref="paper", x0=pin.first, x1=max(pin.last, pin.first), y0=0, y1=1,
                fillcolor=colour, opacity=0.08, line_width=0, layer="below",
            )  # fmt: skip
            figure.add_shape(
                type="line", xref="x", yref="paper", x0=pin.first, x1=pin.first, y0=0, y1=1,
                line={"color": colour, "width": 1, "dash": "dot"}, layer="below",
            )  # fmt: skip
    _pins(figure, pins, 1 - strip / inner, p)
    _frame(figure, window, inner + 6 + _AXIS, p, top=6)
    figure.update_layout(
        hovermode="x unified", hoversubplots="axis", dragmode="select", selectdirection="h",
        newselection={"line": {"color": p.faded, "width": 1, "dash": "dot"}},
    )  # fmt: skip
    figure.update_xaxes(anchor=f"y{len(panels)}" if len(panels) > 1 else "y")
    return figure


def _panel(figure: go.Figure, panel: Panel, i: int, domain: tuple[float, float], p: Palette) -> None:
    axis = "y" if i == 1 else f"y{i}"
    drawn = [v for line in panel.lines.values() for v in (line.low, line.high)]
    low, high = _range(drawn, panel.log)
    figure.update_layout({
        f"yaxis{'' if i == 1 else i}": {
            "domain": domain, "range": [low, high], "type": "log" if panel.log else "linear", "fixedrange": True,
            "gridcolor": p.border, "zeroline": False, "nticks": max(3, panel.height // 40), "exponentformat": "power",
            "tickfont": {"size": 11, "color": p.faded}, "ticklabelstandoff": 4,
        }
    })  # fmt: skip
    top = domain[1]
    caption = html_lines(panel.caption, 27)
    below = 34 + 13 * caption.count("<br>")
    _gutter(figure, top, 0, f"<b>{html(panel.title, 24)}</b>", p.text, 13)
    _gutter(figure, top, 17, caption, p.faded, 11)
    for n, (name, line) in enumerate(panel.lines.items()):
        colour = p.lines[n % len(p.lines)]
        _line(figure, line, f"{panel.title} {name}", axis, colour, (low, high), panel.log, p.broken)
        row = f"{html(name, 16)}  <b>{number(line.last) if line.count else '–'}</b> {html(panel.unit, 12)}"
        if below + 15 * n < panel.height - 10:
            _gutter(figure, top, below + 15 * n, row, colour, 12)


def _line(
    figure: go.Figure,
    line: Line,
    name: str,
    axis: str,
    colour: str,
    limits: tuple[float, float],
    log: bool,
    broken: str,
) -> None:
    label = html(name, 40)
    shared = {"yaxis": axis, "xaxis": "x", "showlegend": False}
    if line.reduced:
        # out along the top and back along the bottom: one polygon, whose thin edge keeps one-step extremes visible
        solid = ~np.isnan(line.high)
        x, high, low = line.steps[solid], line.high[solid], line.low[solid]
        figure.add_scatter(
            x=np.concatenate([x, x[::-1]]), y=np.concatenate([high, low[::-1]]), mode="lines", hoverinfo="skip",
            fill="toself", fillcolor=_fade(colour, 0.22), line={"color": _fade(colour, 0.45), "width": 0.7}, **shared,
        )  # fmt: skip
    if line.reduced:
        found = zip(line.low, line.mean, line.high, strict=True)
        text = [f"{number(mean)} ({number(low)} … {number(high)})" for low, mean, high in found]
    else:
        text = [number(v) for v in line.mean]
    figure.add_scatter(
        x=line.steps, y=line.mean, mode="lines", connectgaps=False, line={"color": colour, "width": 1.5},
        customdata=text, hovertemplate=f"{_template(label)}  <b>%{{customdata}}</b><extra></extra>", **shared,
    )  # fmt: skip
    _lonely(figure, line, colour, shared)
    if len(line.odd):
        at = [limits[0] if kind in ("≤ 0", "-inf") else limits[1] for kind in line.odd]
        figure.add_scatter(
            x=line.odd_steps, y=[10**v for v in at] if log else at, mode="markers", customdata=line.odd,
            marker={"symbol": "x-thin", "size": 7, "line": {"width": 1.6, "color": broken}}, cliponaxis=False,
            hovertemplate=f"{_template(label)} <b>%{{customdata}}</b><extra></extra>", **shared,
        )  # fmt: skip


def _lonely(figure: go.Figure, line: Line, colour: str, shared: dict[str, Any]) -> None:
    """Dots for values between two gaps, through which no line runs."""
    absent = np.isnan(line.mean)
    before, after = np.append(True, absent[:-1]), np.append(absent[1:], True)
    alone = ~absent & before & after
    if alone.any():
        figure.add_scatter(
            x=line.steps[alone], y=line.mean[alone], mode="markers", marker={"size": 4, "color": colour},
            hoverinfo="skip", **shared,
        )  # fmt: skip


def _pins(figure: go.Figure, pins: Sequence[Pin], bottom: float, p: Palette) -> None:
    if not pins:
        return
    # a strip of their own above the lines: a mark on the edge of a scale would be clipped or hide a value
    figure.update_layout(yaxis20={"domain": [bottom, 1], "range": [0, 1], "fixedrange": True, "visible": False})
    for head in (False, True):  # numbered heads last, so that they lie on top
        chosen = [pin for pin in pins if bool(pin.label) == head]
        if not chosen:
            continue
        colours = [p.level[pin.severity] for pin in chosen]
        figure.add_scatter(
            x=[pin.first for pin in chosen], y=[0.5] * len(chosen), yaxis="y20", xaxis="x",
            mode="markers+text" if head else "markers", text=[pin.label for pin in chosen], showlegend=False,
            textfont={"color": p.surface, "size": 11, "weight": 700}, cliponaxis=False,
            marker={"symbol": "circle" if head else "triangle-down", "size": 17 if head else 8, "color": colours},
            customdata=[html_lines(pin.text) for pin in chosen], hovertemplate="%{customdata}<extra></extra>",
        )  # fmt: skip


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
    shared = {"type": "heatmap", "x": middle, "y": y, "hoverinfo": "skip"}
    ticks, words = _ticks(low, high, log)
    traces: list[dict[str, Any]] = [
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
        traces.append({
            "type": "scatter", "mode": "markers", "x": middle[cells], "y": np.full(int(cells.sum()), row, np.int16),
            "marker": {"color": "rgba(0,0,0,0)", "size": 1, "maxdisplayed": 1}, "showlegend": False,
            "customdata": value[cells].astype(np.float32),
            "hovertemplate": f"<b>{_template(html(module, 70))}</b><br>%{{customdata:.2e}} · {where}<extra></extra>",
        })  # fmt: skip
        curves.append(module)
    figure = go.Figure(data=traces)  # at once: adding them one by one takes four times as long
    if selected in grid.modules:
        at = grid.modules.index(selected)
        if height >= 8 * rows:
            edge = {"color": p.text, "width": 1.2}
            figure.add_shape(type="rect", xref="paper", x0=0, x1=1, y0=at - 0.5, y1=at + 0.5, line=edge)
        else:  # a frame would hide so low a row
            figure.add_annotation(
                xref="paper", x=1, y=at, text="◂", showarrow=False, xanchor="left", borderpad=0,
                font={"size": 14, "color": p.text},
            )  # fmt: skip
    every = -(-rows * 11 // height)
    labels = [html(label, 32) for label in short_names(grid.modules)]
    figure.update_yaxes(
        range=[rows - 0.5, -0.5], tickvals=y[::every], ticktext=labels[::every],
        tickfont={"size": 11 if rows * 14 <= height else 10, "color": p.text}, fixedrange=True, showgrid=False,
        zeroline=False, ticklabelstandoff=4,
    )  # fmt: skip
    _gutter(figure, 1, -22, html(caption, 36), p.faded, 11)
    _frame(figure, window, height + 32 + _AXIS, p, top=32)
    figure.update_xaxes(showspikes=False)
    figure.update_layout(hovermode="closest", hoverdistance=-1)
    return figure, curves


def _ticks(low: float, high: float, log: bool) -> tuple[list[float], list[str]]:
    """Where a colour bar has labels, and which: up to four powers of ten, or its ends."""
    first, last = math.ceil(low), math.floor(high)
    if not log or last - first < 1:
        edge = 1e-4 * (high - low)  # a label right on the end is left out
        return [low + edge, high - edge], [number(float(f"{10**v if log else v:.2g}")) for v in (low, high)]
    powers = range(first, last + 1, -(-(last - first) // 3))
    return [float(v) for v in powers], [f"1e{v}" for v in powers]


def short_names(names: Sequence[str]) -> list[str]:
    """``names`` without the dotted prefix that all of them share, which is replaced by "…"."""
    parts = [name.split(".") for name in names]
    shared = 0
    while len(names) > 1 and all(len(part) > shared + 1 and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    return ["…" * bool(shared) + ".".join(part[shared:]) for part in parts]


def _frame(figure: go.Figure, window: tuple[int, int], height: int, p: Palette, *, top: int) -> None:
    first, last = window
    pad = max((last - first) * 0.005, 0.5)
    figure.update_layout(
        height=height, margin={"l": GUTTER, "r": RIGHT, "t": top, "b": _AXIS, "autoexpand": False},
        paper_bgcolor=p.surface, plot_bgcolor=p.surface,
        font={"family": _FONT, "color": p.text, "size": 12},
        hoverlabel={
            "bgcolor": p.panel, "bordercolor": p.border, "align": "left",
            "font": {"family": _FONT, "size": 12, "color": p.text},
        },
    )  # fmt: skip
    figure.update_xaxes(
        range=[first - pad, last + pad], fixedrange=True, showgrid=False, zeroline=False, tickformat=",d",
        tickfont={"size": 11, "color": p.faded}, nticks=9, showline=True, linecolor=p.border, ticks="outside",
        tickcolor=p.border, ticklen=4, unifiedhovertitle={"text": "<b>step %{x:,d}</b>"}, spikemode="across",
        spikethickness=1, spikedash="solid", spikecolor=p.faded,
    )  # fmt: skip


def _gutter(figure: go.Figure, y: float, shift: int, text: str, colour: str, size: int) -> None:
    figure.add_annotation(
        xref="paper", yref="paper", x=0, y=y, xshift=-GUTTER, yshift=-shift, xanchor="left", yanchor="top", text=text,
        showarrow=False, align="left", font={"size": size, "color": colour}, borderpad=0,
    )  # fmt: skip


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
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-300):
        spread = abs(low) * 0.1 or 1.0
        return low - spread, high + spread
    return low, high


def _template(text: str) -> str:
    """``text`` inside a hover template, where ``%{`` would begin a field."""
    return text.replace("%", "&#37;")


def _fade(colour: str, alpha: float) -> str:
    digits = colour[1:] if len(colour) == 7 else "".join(c * 2 for c in colour[1:])
    red, green, blue = (int(digits[i : i + 2], 16) for i in (0, 2, 4))
    return f"rgba({red},{green},{blue},{alpha})"
