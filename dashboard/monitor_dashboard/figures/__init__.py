"""Lines and maps as plotly figures; the only room that imports plotly. One file per kind of figure.

All figures of a page share one geometry, so that a step stands at the same place in each: a gutter at the left holds
names and last values, and the visible steps are given explicitly, because a zoom that plotly keeps by itself is lost
when the data change. Dragging selects steps; what follows from it is the page's business.
"""

from __future__ import annotations

from monitor_dashboard.figures.curvature import Spectra, landscape, spectra
from monitor_dashboard.figures.maps import Heads, head_map, heat_map
from monitor_dashboard.figures.sheet import CONFIG
from monitor_dashboard.figures.strips import Band, Envelope, Mark, Panel, Pin, lines
from monitor_dashboard.figures.sweeps import sweep

__all__ = [
    "CONFIG",
    "Band",
    "Envelope",
    "Heads",
    "Mark",
    "Panel",
    "Pin",
    "Spectra",
    "head_map",
    "heat_map",
    "landscape",
    "lines",
    "spectra",
    "sweep",
]
