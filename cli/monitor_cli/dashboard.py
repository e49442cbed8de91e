"""``monitor dashboard``: the Streamlit application, on this machine only."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from monitor.errors import MonitorError, RunFormatError, UsageError
from monitor_cli.common import Debug, reported, runs_folder

if TYPE_CHECKING:
    import subprocess

HOST = "127.0.0.1"
PORT = 8501  # Streamlit's own
START_S = 60.0  # a cold disk on a busy machine; 1 s is usual


def dashboard(
    path: Annotated[
        Path | None,
        typer.Argument(metavar="PATH", help="A run or a folder of runs. Default: ./runs.", show_default=False),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option("--port", metavar="N", min=1, max=65535, help=f"Default: {PORT}, or a free one if it is taken."),
    ] = None,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Only print the address.")] = False,
    debug: Debug = False,
) -> None:
    """Show runs in the browser, live while they are written.

    Serves on 127.0.0.1 only and asks nothing of the network. Ctrl-C ends it.
    """
    with reported(debug):
        # imported late, like http.client below: together a tenth of what `monitor inspect` takes
        import subprocess
        import webbrowser

        folder = runs_folder() if path is None else path
        if not folder.is_dir():
            raise RunFormatError(f"{folder} is no folder; give a run or a folder of runs")
        chosen = _port(port)
        process = subprocess.Popen(
            command(chosen),
            env={**os.environ, "MONITOR_RUNS": str(folder.resolve())},
            stdout=subprocess.DEVNULL,
        )
        # A plain kill of this command must not leave the server behind.
        previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            _wait_until_served(process, chosen)
            url = f"http://{HOST}:{chosen}"
            typer.echo(f"{url} shows {folder.resolve()} (Ctrl-C ends it)")
            if not no_browser:
                webbrowser.open(url)
            process.wait()
        except KeyboardInterrupt:
            typer.echo()
        finally:
            _stop(process)
            signal.signal(signal.SIGTERM, previous)


def command(port: int) -> list[str]:
    """The command that serves the dashboard. Everything is a flag: the user's own Streamlit files stay untouched."""
    spec = importlib.util.find_spec("monitor_dashboard")
    if spec is None or not spec.submodule_search_locations:
        raise MonitorError("monitor_dashboard is not installed; install training-dynamics-monitor again")
    app = Path(spec.submodule_search_locations[0]) / "app.py"
    flags = {
        "server.address": HOST,
        "server.port": str(port),
        "server.headless": "true",
        "server.fileWatcherType": "none",
        "browser.serverAddress": HOST,
        "browser.gatherUsageStats": "false",
        "client.toolbarMode": "viewer",
        "logger.level": "warning",
    }
    # -P: a monitor.py or streamlit.py in the working folder is not ours
    return [sys.executable, "-P", "-m", "streamlit", "run", str(app), *(f"--{k}={v}" for k, v in flags.items())]


def _port(wanted: int | None) -> int:
    if _free(wanted or PORT):
        return wanted or PORT
    if wanted is not None:
        raise UsageError(f"--port {wanted} is taken; give another one, or leave --port out for a free one")
    import socket

    with socket.socket() as s:
        s.bind((HOST, 0))
        return s.getsockname()[1]


def _free(port: int) -> bool:
    import socket

    with socket.socket() as s:
        if os.name == "posix":  # elsewhere it would mean "steal the port"
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((HOST, port))
        except OSError:
            return False
    return True


def _wait_until_served(process: subprocess.Popen[bytes], port: int) -> None:
    import http.client

    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise MonitorError(f"the dashboard's server ended with code {process.returncode} before it answered")
        try:
            # not urllib: a proxy from the environment must not be asked for this machine
            with closing(http.client.HTTPConnection(HOST, port, timeout=2)) as connection:
                connection.request("GET", "/_stcore/health")
                if connection.getresponse().status == 200:
                    return
        except (OSError, http.client.HTTPException):
            pass
        time.sleep(0.1)
    raise MonitorError(f"the dashboard's server did not answer on port {port} within {START_S:.0f} s")


def _stop(process: subprocess.Popen[bytes]) -> None:
    import subprocess

    if process.poll() is None:
        process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
