from __future__ import annotations

from pathlib import Path

import pytest

import monitor.metrics
from monitor.store.writer import RunWriter
from tests.store import kit


@pytest.fixture(autouse=True)
def use_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three small metrics are the only ones, so that these tests do not depend on the real formulas."""
    monkeypatch.setattr(monitor.metrics, "__path__", [str(kit.DEFINITIONS)])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thresholds at which a few hundred rows pass through every kind of part."""
    for name, value in kit.SMALL.items():
        monkeypatch.setattr(f"monitor.store.{name}", value)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> kit.Recorder:
    """A finished run of 400 steps in four large parts. Copy its folder before touching it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(monitor.metrics, "__path__", [str(kit.DEFINITIONS)])
        for name, value in kit.SMALL.items():
            patch.setattr(f"monitor.store.{name}", value)
        folder = tmp_path_factory.mktemp("finished") / "run"
        recorder = kit.Recorder(RunWriter.create(folder, script="t.py"), kit.make_layout())
        for step in range(400):
            recorder.step(step)
        recorder.close()
    return recorder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"
