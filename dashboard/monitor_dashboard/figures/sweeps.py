"""Sweeps: final losses over learning rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from monitor.diagnosis.text import number
from monitor_dashboard.escape import html
from monitor_dashboard.figures.axes import limits_of, scale
from monitor_dashboard.figures.sheet import Sheet
from monitor_dashboard.theme import Palette


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
    sheet = Sheet((0, 1), height, 8, p)
    low, high = float(rates.min()) - 0.1, float(rates.max()) + 0.1
    at, words = scale(low, high, log=True, room=8)
    sheet.xaxis |= {"type": "log", "range": [low, high], "tickvals": at, "ticktext": words}
    limits = limits_of([losses], log)
    at, words = scale(*limits, log=log, room=max(3, height // 40))
    sheet.layout["yaxis"] = sheet.axis(at, words, range=limits, type="log" if log else "linear")
    below = sheet.title(1, "sweep", caption)
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
            sheet.gutter(1, below + 15 * n, html(name, 26), colour, 12)
    sheet.layout |= {"hovermode": "closest", "dragmode": False}
    return sheet.figure()
