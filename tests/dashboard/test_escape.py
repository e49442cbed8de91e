"""Names are data: nothing in them is read as markup, wherever they are shown."""

from __future__ import annotations

import pytest

from monitor_dashboard.escape import html, html_lines, markdown

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=http://192.0.2.1/x.png onerror=alert(1)>",
    "![x](http://192.0.2.1/x.png)",
    "[x](javascript:alert(1))",
    ":material/home: :red[x] :tada:",
    "$x^2$ `code` **bold** | table |",
    "\x1b[31mred\x1b[0m \u202eevil\u2028line",
    "%{x} %{customdata}",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_html_has_no_markup(name: str) -> None:
    for shown in (html(name), html_lines(name).replace("<br>", "")):
        assert not set("<>\"'\x1b\u202e\u2028\n") & set(shown)


@pytest.mark.parametrize("name", HOSTILE)
def test_markdown_has_no_markup(name: str) -> None:
    """Oracle: closed form (every character that begins markup is behind a backslash, every colon before a joiner)."""
    shown = markdown(name)
    for i, c in enumerate(shown):
        if c in "`*_{}[]()#!|~<>&$":
            assert shown[i - 1] == "\\"
        if c == ":":
            assert shown[i + 1] == "\N{WORD JOINER}"
    assert "\x1b" not in shown


def test_long_names_are_cut() -> None:
    assert len(html("a" * 500, 40)) == 40
    assert markdown("layer", 40) == "layer"
