from __future__ import annotations

from pathlib import Path

import pytest

import monitor.metrics
from tests.store import kit


@pytest.fixture(autouse=True)
def use_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three small metrics are the only ones, so that these tests do not depend on the real formulas."""
    monkeypatch.setattr(monitor.metrics, "__path__", [str(kit.DEFINITIONS)])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thresholds at which a few hundred rows pass through every kind of part."""
    monkeypatch.setattr("monitor.store.writer.FLUSH_STEPS", 12)
    monkeypatch.setattr("monitor.store.writer.FAN", 3)
    monkeypatch.setattr("monitor.store.writer.LARGE_ROWS", 500)
    monkeypatch.setattr("monitor.store.writer.LARGE_STEPS", 60)
    monkeypatch.setattr("monitor.store.parts.ROW_GROUP", 64)
    monkeypatch.setattr("monitor.store.parts._BATCH", 16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"
