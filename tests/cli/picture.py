"""Make the picture of the README, cli/inspect.png: ``python tests/cli/picture.py``."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

ROOT = Path(__file__).parents[2]
COLOURS = [(36, 41, 47), (180, 40, 40), (30, 120, 60), (160, 90, 0), (30, 90, 150), (120, 60, 140), (0, 120, 130)]
PAPER, INK, FADED = (250, 250, 248), (36, 41, 47), (140, 140, 140)
PAGE = """<body style="margin:0;background:{background};color:{foreground}">
<pre style="font:14px/18px DejaVu Sans Mono,monospace;padding:22px;margin:0">{code}</pre></body>"""


def main() -> None:
    """Run the command in a terminal 100 characters wide and write what it looks like."""
    done = subprocess.run(
        [sys.executable, "-m", "monitor_cli", "inspect", "sample_runs/modular_addition_collapse"],
        cwd=ROOT, capture_output=True, text=True, check=True,
        env=os.environ | {"FORCE_COLOR": "1", "COLUMNS": "100", "TTY_COMPATIBLE": "1"},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "nothing").open("w") as nowhere:
        console = Console(record=True, width=100, file=nowhere)
        console.print(Text("$ monitor inspect\n"))
        console.print(Text.from_ansi(done.stdout), end="")
        theme = TerminalTheme(PAPER, INK, [*COLOURS, FADED], [FADED, *COLOURS[1:], INK])
        html = console.export_html(theme=theme, inline_styles=True, code_format=PAGE)
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 940, "height": 600})
            page.set_content(html)
            page.screenshot(path=ROOT / "cli" / "inspect.png", full_page=True)
            browser.close()


if __name__ == "__main__":
    main()
