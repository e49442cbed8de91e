from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from monitor_cli import dashboard

if TYPE_CHECKING:
    from .conftest import Record, Shell


def test_everything_is_a_flag() -> None:
    python, *flags = dashboard.command(8123)
    assert python == sys.executable
    assert flags[:4] == ["-P", "-m", "streamlit", "run"]
    assert Path(flags[4]).is_file()
    assert {
        "--server.address=127.0.0.1",
        "--server.port=8123",
        "--server.headless=true",
        "--server.fileWatcherType=none",
        "--browser.gatherUsageStats=false",
        "--client.toolbarMode=viewer",
    } <= set(flags)


def test_a_missing_folder_is_one_line(shell: Shell, tmp_path: Path) -> None:
    result = shell("dashboard", tmp_path / "missing", "--no-browser")
    assert result.exit_code == 3
    assert len(result.stderr.splitlines()) == 1
    assert "missing is no folder" in result.stderr


def test_a_port_that_is_taken(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        taken = s.getsockname()[1]
        result = shell("dashboard", tmp_path, "--port", taken)
        assert result.exit_code == 2
        assert f"--port {taken} is taken" in result.stderr
        monkeypatch.setattr(dashboard, "PORT", taken)
        assert dashboard._port(None) not in (taken, 0)


def test_a_server_that_dies_is_one_line(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboard, "command", lambda port: [sys.executable, "-c", "raise SystemExit(9)"])
    result = shell("dashboard", tmp_path, "--no-browser")
    assert result.exit_code == 3
    assert "ended with code 9" in result.stderr


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_this_machine_only_and_leaves_nothing(record: Record, tmp_path: Path, how: signal.Signals) -> None:
    path = record("run")
    home = tmp_path / "home"
    home.mkdir()
    # what a user may have beside their runs must not be taken for ours
    (path.parent / "streamlit.py").write_text("raise SystemExit('not this one')")
    (path.parent / "monitor.py").write_text("raise SystemExit('not this one')")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "monitor_cli", "dashboard", "run", "--no-browser", "--port", str(port)],
        cwd=path.parent,
        env={**os.environ, "HOME": str(home), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == f"http://127.0.0.1:{port} shows {path} (Ctrl-C ends it)\n"
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
            connection.request("GET", "/")
            assert connection.getresponse().status == 200
        assert _listening(port) == {"0100007F"}
    finally:
        process.send_signal(how)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 0
    assert (out.strip(), err) == ("", "")
    assert _listening(port) == set()
    assert list(home.iterdir()) == []


def _listening(port: int) -> set[str]:
    """Addresses on which something listens at ``port``, in hexadecimal, as the kernel has them."""
    found = set()
    for table in ("tcp", "tcp6"):
        text = Path(f"/proc/net/{table}").read_text()
        found |= set(re.findall(rf"\s([0-9A-F]+):{port:04X} [0-9A-F]+:0000 0A ", text))
    return found
