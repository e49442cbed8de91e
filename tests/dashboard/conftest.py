"""Runs to show, written by the real writer from rows made by formula; pages alone, the real server and a browser."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streamlit.testing.v1 import AppTest

import monitor
import monitor_dashboard
from monitor.block import ABSENT, Layout, RawBlock, Segment, evaluate
from monitor.diagnosis.engine import Engine, rules_hash
from monitor.metric import load_metrics
from monitor.rule import load_rules
from monitor.store.writer import RunWriter
from monitor_dashboard import data
from tests.dashboard.kit import healthy, wait_for

CHROMIUM = Path("/usr/bin/chromium")
APP = Path(monitor_dashboard.__file__).parent / "app.py"
SOURCES = [str(APP.parents[1]), str(Path(monitor.__file__).parents[1])]
LOGITS = ("n", "classes", "sum_norm", "max_norm", "sum_cnorm", "max_cnorm")
GRADIENT = ("norm", "max_abs", "nonfinite")
UPDATE = ("update_norm", "param_norm")
MODULES = tuple(f"blocks.{i}.{part}.weight" for i in range(4) for part in ("attn", "mlp"))


class Scripted:
    """A run whose loss falls, jumps at ``spike`` and whose second tensor has a NaN gradient at ``nan``."""

    def __init__(self, folder: Path, *, modules: tuple[str, ...] = MODULES, spike: int = -1, nan: int = -1) -> None:
        self.modules, self.spike, self.nan = modules, spike, nan
        self.writer = RunWriter.create(folder, script="train.py")
        self.path = self.writer.path
        self._random = np.random.default_rng(0)
        self.step = 0
        self._pending: list[tuple[int, np.ndarray]] = []
        parts = (
            ("loss", ("value", "micro_steps"), ("",)),
            ("logit_rows", LOGITS, ("cross_entropy",)),
            ("gradient", GRADIENT, modules),
            ("update", UPDATE, modules),
        )
        segments, offset = [], 0
        for name, stats, axis in parts:
            segments.append(Segment(name, stats, axis, offset))
            offset += len(stats) * len(axis)
        self.layout = Layout(0, tuple(segments))
        facts: dict[str, Any] = {
            "modules": [],
            "parameters": [
                {"name": m, "shape": [8, 8], "dtype": "float32", "numel": 64, "trainable": True, "optimizer": 0,
                 "group": 0, "tied_to": []}
                for m in modules
            ],
            "optimizers": [{"class": "AdamW", "groups": [{"lr": 1e-3}]}],
        }  # fmt: skip
        self.writer.update(facts=facts, overhead={"fraction": 0.012, "seconds": 1.0})
        self.engine = Engine(load_rules(), facts)
        self.writer.tail.layout(self.layout)

    def _row(self, step: int) -> np.ndarray:
        row = np.full(self.layout.size, ABSENT, dtype=np.float32)
        noise = 1 + 0.02 * self._random.standard_normal(2 + 4 * len(self.modules))
        loss = (0.2 + 4 * np.exp(-step / 60)) * noise[0] * (40 if step == self.spike else 1)
        norm = 5 * np.sqrt(1 + step / 20) * noise[1]
        values: list[Any] = [loss, 1, 64, 10, 64 * norm, 2 * norm, 64 * norm, 1.9 * norm]
        for i in range(len(self.modules)):
            size = (0.3 + 0.1 * i) * noise[2 + i] * (60 if step == self.spike else 1)
            broken = step == self.nan and i == 1
            values += [np.nan if broken else size, size / 3, 4 if broken else 0]
        for i in range(len(self.modules)):
            values += [1e-3 * noise[2 + len(self.modules) + i], 8 + 0.01 * step]
        row[:] = values
        return row

    def train(self, steps: int) -> Scripted:
        """Record ``steps`` more steps to the tail."""
        for _ in range(steps):
            row = self._row(self.step)
            self.writer.tail.row(self.step, self.layout.number, row.tobytes())
            self._pending.append((self.step, row))
            self.step += 1
        return self

    def flush(self) -> Scripted:
        """Move what is in the tail to a part, findings included."""
        at, rows = zip(*self._pending, strict=True)
        self._pending = []
        block = RawBlock(self.layout, np.array(at), np.stack(rows))
        columns = evaluate(block, [m for m in load_metrics().values() if self._reads(m)])
        self.writer.tail.rotate(self.step)
        self.writer.append(columns)
        self.engine.feed(columns)
        self.writer.findings(self.engine.findings(), self.engine.state(), rules_hash(load_rules()))
        self.writer.flush(force=True)
        return self

    def _reads(self, metric: Any) -> bool:
        return metric.id in ("loss", "logit_norm", "grad_norm", "update_ratio", "param_norm")

    def finish(self) -> Path:
        """Close the run; its folder."""
        self.flush()
        self.writer.close("finished")
        return self.path


@pytest.fixture
def scripted() -> Callable[..., Scripted]:
    """Makes a `Scripted` run."""
    return Scripted


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test sees the folder of another."""
    monkeypatch.delenv("MONITOR_RUNS", raising=False)
    yield
    os.environ.pop("MONITOR_RUNS", None)


@pytest.fixture
def show_page(monkeypatch: pytest.MonkeyPatch) -> Callable[..., AppTest]:
    """Runs the page of this title alone on a folder of runs, with an address."""

    def run(title: str, folder: Path, **address: Any) -> AppTest:
        monkeypatch.setenv(data.RUNS_VARIABLE, str(folder))
        data.list_runs.clear()
        app = AppTest.from_function(_alone, args=(title, address.pop("run", "")), default_timeout=60)
        for name, value in address.items():
            app.query_params[name.rstrip("_")] = value
        app.run()
        assert not app.exception, app.exception
        return app

    return run


def _alone(title: str, name: str) -> None:
    from monitor_dashboard import data
    from monitor_dashboard.page import load_pages

    (page,) = (p for p in load_pages() if p.title == title)
    runs = data.list_runs(data.runs_root())
    page.render(data.view(runs.get(name, next(iter(runs.values())))))


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Any]:
    """Starts the real server on a folder, from a folder of no importance; its address."""
    started: list[subprocess.Popen[bytes]] = []

    def start(folder: Path) -> str:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        command = [sys.executable, "-m", "streamlit", "run", str(APP), f"--server.port={port}"]
        path = os.pathsep.join([*SOURCES, os.environ.get("PYTHONPATH", "")])
        with (tmp_path / "server.log").open("wb") as log:
            started.append(
                subprocess.Popen(
                    command,
                    cwd=tmp_path,
                    env=os.environ | {"MONITOR_RUNS": str(folder), "PYTHONPATH": path},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
        wait_for(lambda: healthy(port), "the server answers", seconds=60)
        return f"http://127.0.0.1:{port}"

    yield start
    for process in started:
        process.terminate()
        process.wait(10)


@pytest.fixture
def page() -> Iterator[Any]:
    """A page of a browser that writes down what it is asked to fetch and what goes wrong: ``asked``, ``wrong``."""
    if not CHROMIUM.exists():
        pytest.skip(f"no browser: {CHROMIUM} is not installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        shown: Any = browser.new_page(viewport={"width": 1440, "height": 900})
        shown.asked, shown.wrong = [], []
        shown.on("request", lambda request: shown.asked.append(request.url))
        shown.on("websocket", lambda socket: shown.asked.append(socket.url))
        shown.on("pageerror", lambda error: shown.wrong.append(str(error)))
        shown.on("console", lambda line: shown.wrong.append(line.text) if line.type == "error" else None)
        yield shown
        browser.close()
