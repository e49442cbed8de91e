"""What the tests of several commands ask of a fresh interpreter."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

#: The least that any command imports.
FLOOR = ("-c", "import typer, rich.table, numpy, pyarrow.parquet")


def assert_light(*args: str) -> None:
    """Fails if a command line loads what only recording or the dashboard needs."""
    code = (
        "import sys\n"
        "from monitor_cli.app import app\n"
        "try:\n app()\n"
        "except SystemExit as e:\n assert e.code == 0, e.code\n"
        "heavy = {'torch', 'pandas', 'duckdb', 'streamlit', 'plotly', 'monitor_dashboard'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def spent(*args: str) -> float:
    """Seconds of CPU, with modules compiled from the second time on, as for a user."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *args], env=env, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
