"""Make a picture of a page: ``python tests/dashboard/picture.py [FILE [RUNS [ADDRESS]]]``.

Without arguments it makes the one of the README, dashboard/dashboard.png.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[2]


def main(
    file: str = str(ROOT / "dashboard" / "dashboard.png"),
    runs: str = str(ROOT / "sample_runs" / "modular_addition_collapse"),
    address: str = "",
) -> None:
    """Serve ``runs``, open the page at ``address`` and write what it looks like to ``file``."""
    command = [sys.executable, "-m", "monitor_cli", "dashboard", runs, "--no-browser"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().partition(" ")[0]  # said once it answers
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1440, "height": 900})
            page.goto(f"{url}/{address}")
            page.wait_for_selector(".js-plotly-plot .main-svg", timeout=60_000)
            page.wait_for_timeout(3000)
            page.screenshot(path=file)
            browser.close()
    finally:
        server.terminate()
        server.wait(10)


if __name__ == "__main__":
    main(*sys.argv[1:])
