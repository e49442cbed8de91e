"""The look is one: Streamlit's own surfaces and the figures agree, and nothing of it comes from elsewhere."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import monitor_dashboard
from monitor_dashboard import theme

ROOT = Path(monitor_dashboard.__file__).parent
CONFIG = tomllib.loads((ROOT / ".streamlit" / "config.toml").read_text(encoding="utf-8"))


def test_surfaces_agree() -> None:
    for name, palette in (("light", theme.LIGHT), ("dark", theme.DARK)):
        found = CONFIG["theme"][name]
        assert found["backgroundColor"] == palette.surface
        assert found["secondaryBackgroundColor"] == palette.panel
        assert found["textColor"] == palette.text
        assert found["borderColor"] == palette.border
        assert found["primaryColor"] == palette.lines[0]


def test_stays_on_this_machine() -> None:
    assert CONFIG["server"]["address"] == "127.0.0.1"
    assert CONFIG["browser"]["gatherUsageStats"] is False


def test_style_fetches_nothing() -> None:
    style = theme.css(theme.LIGHT, navigation=False)
    assert not re.search(r"url\(|@import|https?:", style)


def test_text_can_be_read() -> None:
    """Oracle: closed form (WCAG contrast of text and of every level's colour on its surface, at least 4.5 : 1)."""
    for palette in (theme.LIGHT, theme.DARK):
        for colour in (palette.text, palette.faded, *palette.level.values()):
            assert contrast(colour, palette.surface) >= 4.5, colour


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
