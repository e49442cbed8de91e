"""A smoke test, no more: eight small healthy trainings of different architectures give no warning.

It says nothing about the false-alarm rate on long or large trainings.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import monitor
from tests.integration.trainings import TRAININGS


@pytest.mark.parametrize("name", TRAININGS)
def test_no_warning(name: str, tmp_path: Path) -> None:
    """Oracle: planted fault, absent. A training that learns gives findings of level info at most."""
    with_handle: list[monitor.Handle] = []
    trained = TRAININGS[name](lambda model: with_handle.append(monitor.attach(model, tmp_path / name)))
    with_handle[0].close()
    losses = trained.losses
    assert sum(losses[-20:]) / 20 < 0.6 * losses[0]
    run = monitor.open(tmp_path / name)
    assert run.steps == len(losses)
    assert [f for f in run.findings() if f.severity != "info"] == []
