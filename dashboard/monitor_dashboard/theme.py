"""Colours and the style sheet: calm surfaces, and colour only where it says something.

The same surfaces stand in ``.streamlit/config.toml`` beside ``app.py`` (a test compares the two); Streamlit reads that
file because it lies beside the script, so the user's own configuration is neither read for the look nor touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import streamlit as st

_STYLE = Path(__file__).with_name("style.css")


@dataclass(frozen=True)
class Palette:
    """Colours of one of the two looks. ``level`` maps a verdict's level or a finding's severity to its colour."""

    surface: str
    panel: str
    text: str
    faded: str
    border: str
    lines: tuple[str, ...]
    scale: tuple[str, ...]
    broken: str
    level: dict[str, str]


LIGHT = Palette(
    surface="#fdfdfc",
    panel="#f4f5f3",
    text="#1c2328",
    faded="#66717b",
    border="#e2e5e2",
    lines=("#1f5a94", "#7a4fa0", "#0f7c74", "#8a6d1d", "#a2456b", "#4c6a2f", "#5b6770", "#b5541c"),
    scale=("#f1f4f2", "#cfe3dd", "#93c6bf", "#4f9fa6", "#2a7391", "#244a75", "#1f2550"),
    broken="#d6007a",
    level={
        "healthy": "#2c7a4b",
        "info": "#3a6ea5",
        "warning": "#9d5d00",
        "critical": "#b92f2a",
        "not_enough_evidence": "#66717b",
    },
)

DARK = Palette(
    surface="#14181b",
    panel="#1c2125",
    text="#e4e8ea",
    faded="#94a0a9",
    border="#2c3338",
    lines=("#6fb1ec", "#bd93e0", "#4fc3b5", "#d9b44a", "#e88bb0", "#a3c774", "#a8b3bb", "#f0945e"),
    scale=("#1b2227", "#1f3a45", "#23576a", "#2f7f8b", "#5aa99f", "#a5d0ac", "#f0f4c9"),
    broken="#ff4fb0",
    level={
        "healthy": "#5cbf85",
        "info": "#74aee6",
        "warning": "#eda73a",
        "critical": "#f0716a",
        "not_enough_evidence": "#94a0a9",
    },
)


def palette() -> Palette:
    """The look the reader's browser shows."""
    return DARK if st.context.theme.type == "dark" else LIGHT


def css(p: Palette, *, navigation: bool) -> str:
    """The style sheet of the page, as a ``<style>`` element.

    Args:
        p: the look.
        navigation: several pages are listed in the top bar; without any, the bar is empty and its room is given back.
    """
    levels = "".join(f".level-{name} {{ --level: {colour} }}" for name, colour in p.level.items())
    bar = (
        ""
        if navigation
        else '[data-testid="stHeader"] { display: none } .stMainBlockContainer { padding-top: 0.75rem }'
    )
    root = f":root {{ --border: {p.border}; --faded: {p.faded}; --panel: {p.panel} }}"
    return f"<style>{root}{levels}{_STYLE.read_text(encoding='utf-8')}{bar}</style>"
