"""Make a picture of a page: ``python tests/dashboard/picture.py [FILE [RUNS [ADDRESS]]]``.

Without arguments it makes the one of the README, dashboard/dashboard.png.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[2]


def main(
    file: str = str(ROOT / "dashboard" / "dashboard.png"),
    runs: str = str(ROOT / "sample_runs" / "modular_addition_collapse"),
    address: str = "",
) -> None:
    """Serve ``runs``, open the page at ``address`` and write what it looks like to ``file``."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{s.getsockname()[1]}"
    app = ROOT / "dashboard" / "monitor_dashboard" / "app.py"
    path = os.pathsep.join([str(ROOT / "dashboard"), str(ROOT)])
    server = subprocess.Popen(
        [sys.executable, "-m", "streamlit", "run", str(app), f"--server.port={url.rpartition(':')[2]}"],
        env=os.environ | {"MONITOR_RUNS": str(Path(runs).resolve()), "PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
    )
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{url}/_stcore/health", timeout=2)
                break
            except OSError:
                time.sleep(0.2)
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
