"""The key of every widget. Widgets bound to the address use it as their query parameter: a link shows the same view."""

from __future__ import annotations

from enum import StrEnum


class Key(StrEnum):
    """A widget's key."""

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
    LOG_STEPS = "logsteps"
    PHASES = "phases"
    HEAD_METRIC = "attention"
    HEAD = "head"
    HEAD_STEP = "at"
    HEAD_MAP = "headmap"
    ROUTER = "router"
    LOADS = "loads"
    ROUTING = "routing"
    CURVATURE = "curvature"
    SPECTRUM = "spectrum"
    LANDSCAPE = "landscape"
    BLOCKS = "blocks"
    AGAINST = "against"
    SERIES = "series"
    SERIES_OF = "of"
    COMPARED = "compared"
    SWEEP = "sweep"
