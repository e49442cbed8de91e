"""The key of every widget. Those of `URL` are also query parameters: a link shows the same view."""

from __future__ import annotations

from enum import StrEnum


class Key(StrEnum):
    """A widget's key; where the widget is bound to the address, also the name of the query parameter."""

    RUN = "run"
    LIVE = "live"
    FIRST = "from"
    LAST = "to"
    WHOLE = "whole"
    LOG = "log"
    SIGNAL = "signal"
    METRIC = "metric"
    MODULE = "module"
    LINES = "lines"
    MAP = "map"
    DETAIL = "detail"
    ZOOM = "zoom"
