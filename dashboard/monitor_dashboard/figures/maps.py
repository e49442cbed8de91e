"""Maps: modules over steps, and heads of attention over layers, coloured by value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go

from monitor.diagnosis.text import number
from monitor_dashboard.escape import html
from monitor_dashboard.figures.axes import colour_ticks, span
from monitor_dashboard.figures.names import short_names
from monitor_dashboard.figures.sheet import Sheet, fade, template
from monitor_dashboard.sampling import INF, MISSING, NAN, VALUE, Floats, Grid
from monitor_dashboard.theme import Palette

#: A row of fewer pixels is pointed at; a frame would hide it.
_FRAMED = 8


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
    state: npt.NDArray[np.int8]


def heat_map(
    grid: Grid, caption: str, selected: str, window: tuple[int, int], p: Palette, *, log: bool
) -> tuple[go.Figure, list[str]]:
    """Modules × steps, coloured by the largest value of each cell; non-finite cells have a colour of their own.

    Args:
        grid: what to draw.
        caption: what is drawn, plain text.
        selected: module to frame, none if empty.
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
    sheet = Sheet(window, height, 32, p)
    _colours(sheet, grid.values, grid.state, caption, log, x=middle, y=y)
    curves = [""] * len(sheet.traces)
    where = "step %{x:,d}" if grid.width == 1 else f"largest of {grid.width:,} steps around %{{x:,.0f}}"
    # plotly reports clicks on points only, never on a map: an invisible point in every cell also carries the label
    for row, module in enumerate(grid.modules):
        cells = grid.state[row] != MISSING
        value = np.where(grid.state[row] == NAN, np.nan, np.where(grid.state[row] == INF, np.inf, grid.values[row]))
        # of a row without gaps plotly counts the steps itself
        at = {"x0": middle[0], "dx": grid.width} if cells.all() else {"x": middle[cells]}
        sheet.line(
            **at, y=np.full(int(cells.sum()), row, np.int16), mode="markers",
            marker={"color": "rgba(0,0,0,0)", "size": 1, "maxdisplayed": 1}, customdata=value[cells].astype(np.float32),
            hovertemplate=f"<b>{template(html(module, 70))}</b><br>%{{customdata:.2e}} · {where}<extra></extra>",
        )  # fmt: skip
        curves.append(module)
    if selected and selected in grid.modules:
        at = grid.modules.index(selected)
        if height >= _FRAMED * rows:
            _frame(sheet, x0=0, x1=1, y0=at - 0.5, y1=at + 0.5, xref="paper")
        else:
            sheet.annotations.append({
                "xref": "paper", "x": 1, "y": at, "text": "◂", "showarrow": False, "xanchor": "left", "borderpad": 0,
                "font": {"size": 14, "color": p.text},
            })  # fmt: skip
    every = max(1, -(-rows * 11 // height))
    labels = [html(label, 32) for label in short_names(grid.modules)]
    sheet.layout["yaxis"] = sheet.axis(
        y[::every].tolist(), labels[::every], range=[rows - 0.5, -0.5], showgrid=False,
        tickfont={"size": 11 if rows * 14 <= height else 10, "color": p.text},
    )  # fmt: skip
    sheet.layout |= {"hovermode": "closest", "hoverdistance": -1}
    return sheet.figure(), curves


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
    sheet = Sheet((0, widest - 1), height, 32, p)
    told = [[number(v) if s != MISSING else "" for v, s in zip(*row, strict=True)]
            for row in zip(heads.values, heads.state, strict=True)]  # fmt: skip
    written = {"text": told, "texttemplate": "%{text}", "textfont": {"size": 11}}
    _colours(
        sheet, heads.values, heads.state, caption, log, x=np.arange(widest), y=np.arange(layers), xgap=1, ygap=1,
        **(written if widest <= 16 and layers <= 24 else {}),
    )  # fmt: skip
    rows, columns = np.nonzero(heads.state != MISSING)
    modules = [f"{heads.layers[i]}[{j}]" for i, j in zip(rows, columns, strict=True)]
    # as in heat_map: a click is reported for a point only
    sheet.line(
        x=columns, y=rows, mode="markers", marker={"color": "rgba(0,0,0,0)", "size": 24},
        customdata=[[template(html(m, 70)), told[i][j]] for m, i, j in zip(modules, rows, columns, strict=True)],
        hovertemplate="<b>%{customdata[0]}</b><br>%{customdata[1]}<extra></extra>",
    )  # fmt: skip
    if selected in modules:
        i, j = rows[modules.index(selected)], columns[modules.index(selected)]
        _frame(sheet, x0=j - 0.5, x1=j + 0.5, y0=i - 0.5, y1=i + 0.5)
    every = max(1, -(-layers * 12 // height))
    labels = [html(name, 28) for name in heads.layers]
    sheet.layout["yaxis"] = sheet.axis(
        np.arange(layers)[::every].tolist(), labels[::every], range=[layers - 0.5, -0.5], showgrid=False,
        tickfont={"size": 11, "color": p.text},
    )  # fmt: skip
    at = list(range(0, widest, max(1, -(-widest // 16))))
    sheet.xaxis |= {"range": [-0.5, widest - 0.5], "tickvals": at, "ticktext": [f"head {i}" for i in at]}
    sheet.layout |= {"hovermode": "closest", "hoverdistance": -1, "dragmode": False}
    return sheet.figure(), modules


def _colours(sheet: Sheet, values: Floats, state: npt.NDArray[np.int8], caption: str, log: bool, **shared: Any) -> None:
    """Two layers of a map, the values and over them what is not finite, with the words above that say which is which.

    Args:
        sheet: where to draw.
        values: ``(row, column)``.
        state: ``(row, column)``, of `monitor_dashboard.sampling`.
        caption: what is drawn, plain text.
        log: as in `heat_map`.
        shared: what else plotly is to know of both layers.
    """
    p = sheet.p
    shade = np.where(state == VALUE, values, np.nan)
    low, high = span(np.log10(shade[shade > 0]) if log else shade)
    if log:
        with np.errstate(divide="ignore", invalid="ignore"):
            shade = np.where(shade > 0, np.log10(shade), np.where(state == VALUE, low, np.nan))
    broken = state >= NAN
    shared |= {"type": "heatmap", "hoverinfo": "skip"}
    bar = sheet.colours(p.scale, *colour_ticks(low, high, log))
    sheet.traces += [
        shared | bar | {
            "z": shade.astype(np.float32), "zmin": low, "zmax": high, "showscale": bool((state == VALUE).any()),
        },
        {k: v for k, v in shared.items() if "text" not in k} | {
            "z": broken.astype(np.uint8), "zmin": 0, "zmax": 1,
            "colorscale": [[0, fade(p.broken, 0)], [1, p.broken]], "showscale": False,
        },
    ]  # fmt: skip
    key = f'  <span style="color: {p.broken}">■</span> NaN or infinite' if broken.any() else ""
    sheet.gutter(1, -22, html(caption, 36) + key, p.faded, 11)


def _frame(sheet: Sheet, **box: Any) -> None:
    """A frame around what is selected, with a light edge where the map is dark and a dark one where it is light."""
    for colour, width in ((sheet.p.surface, 3.5), (sheet.p.text, 1.4)):
        sheet.shapes.append({"type": "rect", "line": {"color": colour, "width": width}} | box)
