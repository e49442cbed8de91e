"""Text from run folders, made harmless: names are data that anybody may have written.

A name is shown through exactly one of `monitor.diagnosis.text.plain` (widgets that show text as it is), `html` (our own
HTML and everything plotly draws, which reads a dialect of HTML) or `markdown` (labels of expanders).
"""

from __future__ import annotations

import html as _html
import re
import textwrap

from monitor.diagnosis.text import plain

_MARKUP = re.compile(r"([\\`*_{}\[\]()#+\-.!|~<>&$^\"'])")


def html(text: object, width: int | None = None) -> str:
    """``text`` as HTML text or attribute, nothing in it read as markup; the middle is cut out beyond ``width``."""
    return _html.escape(plain(text, width))


def html_lines(text: object, width: int = 64) -> str:
    """``text`` as HTML, broken into lines of ``width`` characters: plotly's hover labels do not wrap."""
    return "<br>".join(_html.escape(line) for line in textwrap.wrap(plain(text), width))


def markdown(text: object, width: int | None = None) -> str:
    """``text`` as Markdown that is read as nothing but text.

    Colour directives, emoji shortcodes and remote icons begin with a colon and are replaced after unescaping, so a
    backslash does not stop them; an invisible joiner behind each colon does.
    """
    return _MARKUP.sub(r"\\\1", plain(text, width)).replace(":", ":\N{WORD JOINER}")
