"""What all figures have in common: the geometry, the gutter, the colour bar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from monitor_dashboard.escape import html, html_lines
from monitor_dashboard.theme import Palette

GUTTER, RIGHT = 196, 14
_AXIS = 34
_FONT = '"Source Sans", sans-serif'
#: Characters of a line of a caption.
_LINE = 27
#: A window of fewer steps has a label for each.
_FEW = 9
#: What every chart is given: the tool bar would offer a second zoom, which does not survive new data.
CONFIG: dict[str, Any] = {"displayModeBar": False, "responsive": True, "scrollZoom": False}


class Sheet:
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
        if last - first < _FEW:  # plotly would label halves of steps, rounded
            self.xaxis |= {"tickvals": list(range(first, last + 1))}
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

    def axis(self, at: Sequence[float], words: Sequence[str], **more: Any) -> dict[str, Any]:
        """An upright axis with these labels."""
        return {
            "tickvals": at, "ticktext": words, "fixedrange": True, "zeroline": False, "ticks": "",
            "gridcolor": self.p.border, "tickfont": {"size": 11, "color": self.p.faded}, "ticklabelstandoff": 4,
        } | more  # fmt: skip

    def gutter(self, y: float, down: int, text: str, colour: str, size: int) -> None:
        """Write HTML into the gutter, ``down`` pixels below ``y`` of the figure's height."""
        self.annotations.append({
            "xref": "paper", "yref": "paper", "x": 0, "y": y, "xshift": -GUTTER, "yshift": -down, "xanchor": "left",
            "yanchor": "top", "text": text, "showarrow": False, "align": "left", "borderpad": 0,
            "font": {"size": size, "color": colour},
        })  # fmt: skip

    def title(self, y: float, name: str, caption: str) -> int:
        """Write a name and what it is, both plain text, at the top of the gutter; where the next line goes, in pixels.

        Args:
            y: as in `gutter`.
            name: what is drawn.
            caption: what that is.
        """
        self.gutter(y, 0, f"<b>{html(name, 24)}</b>", self.p.text, 13)
        self.gutter(y, 17, html_lines(caption, _LINE), self.p.faded, 11)
        return below(caption)

    def note(self, y: float, text: str) -> None:
        """Write plain text across the middle of the chart, at ``y`` of the figure's height."""
        self.annotations.append({
            "xref": "paper", "yref": "paper", "x": 0.5, "y": y, "xanchor": "center", "yanchor": "middle",
            "text": html(text), "showarrow": False, "font": {"size": 12, "color": self.p.faded},
        })  # fmt: skip

    def colours(self, scale: Sequence[str], at: Sequence[float], words: Sequence[str]) -> dict[str, Any]:
        """The colours of a map's trace, and the bar that tells them above its right end.

        Args:
            scale: colours, evenly spread.
            at: values with a label.
            words: the labels.
        """
        return {
            "colorscale": [[i / (len(scale) - 1), colour] for i, colour in enumerate(scale)],
            "colorbar": {
                "orientation": "h", "thickness": 6, "len": 0.3, "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom",
                "tickvals": at, "ticktext": words, "tickfont": {"size": 10, "color": self.p.faded}, "outlinewidth": 0,
                "ypad": 8, "xpad": 0, "ticklabelposition": "outside top",
            },
        }  # fmt: skip

    def figure(self) -> go.Figure:
        """The finished figure."""
        drawn = {"xaxis": self.xaxis, "shapes": self.shapes, "annotations": self.annotations}
        return go.Figure(data=self.traces, layout=self.layout | drawn)


def below(caption: str) -> int:
    """How far below a title the first line under its caption stands, in pixels."""
    return 34 + 13 * html_lines(caption, _LINE).count("<br>")


def template(text: str) -> str:
    """``text`` inside a hover template, where ``%{`` would begin a field."""
    return text.replace("%", "&#37;")


def fade(colour: str, alpha: float) -> str:
    """A colour of the palette, let through by ``alpha``."""
    digits = colour[1:] if len(colour) == 7 else "".join(c * 2 for c in colour[1:])
    red, green, blue = (int(digits[i : i + 2], 16) for i in (0, 2, 4))
    return f"rgba({red},{green},{blue},{alpha})"
