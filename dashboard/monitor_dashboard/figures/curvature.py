"""Curvature: the spectrum of the Hessian over steps, and the loss around the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go

from monitor.diagnosis.text import number
from monitor_dashboard.figures.axes import colour_ticks, scale, span
from monitor_dashboard.figures.sheet import Sheet
from monitor_dashboard.sampling import Floats
from monitor_dashboard.theme import Palette

#: Rows of the map of spectral densities.
_CELLS = 75


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
    sheet = Sheet(window, height, 32, p)
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
    low, high = span(shade)
    ticks, words = colour_ticks(low, high, log=True)
    # a single outlier must be seen, however little it weighs
    sheet.traces.append({
        "type": "heatmap", "x": np.append(measured, measured[-1] + width), "y": rows, "z": shade.astype(np.float32),
        "zmin": low, "zmax": high, "hoverinfo": "skip", **sheet.colours(p.scale[2:], ticks, words),
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
    sheet.layout["yaxis"] = sheet.axis(
        up(labels).tolist(), [number(v) for v in labels], range=ends, zeroline=True, zerolinecolor=p.faded,
        zerolinewidth=1,
    )  # fmt: skip
    sheet.title(1, "spectral_density", f"{caption}, {unit}")
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
    sheet = Sheet((0, 1), 300, 32, p)
    values = np.where(np.isfinite(loss), loss, np.nan)
    low, high = span(values)
    ticks, words = scale(low, high, log=False, room=4)
    sheet.traces.append({
        "type": "contour", "x": first, "y": second, "z": values.T, "ncontours": 24, "connectgaps": False,
        "line": {"width": 0.5, "color": p.faded},
        "hovertemplate": "%{x:.3g} along the first, %{y:.3g} along the second<br>loss <b>%{z:.4g}</b><extra></extra>",
        **sheet.colours(p.scale, ticks, words),
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
    sheet.layout["yaxis"] = sheet.axis(at, words, range=ends)
    sheet.title(1, "landscape", caption)
    sheet.layout |= {"hovermode": "closest", "dragmode": False}
    return sheet.figure()
