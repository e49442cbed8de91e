"""Runs to look at, written by the library's own writer from made-up series."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from monitor.block import ColumnBlock
from monitor.metric import Array
from monitor.store.writer import RunWriter

STEPS = 300
JUMP = 200

#: ``metric.column`` -> module -> one value per step.
Series = Mapping[str, Mapping[str, Array]]


def quiet(parameters: int = 4, seed: int = 0) -> dict[str, dict[str, Array]]:
    """A training in which nothing happens."""
    rng = np.random.default_rng(seed)
    falling = np.exp(-np.arange(STEPS) / 60)

    def noisy(scale: float = 1.0) -> Array:
        return scale * (0.2 + falling) * rng.normal(1.0, 0.05, STEPS)

    return {
        "loss.value": {"": noisy(2.3)},
        "input_rms.rms": {"input[0]": rng.normal(1.0, 0.01, STEPS)},
        "input_rms.nonfinite": {"input[0]": np.zeros(STEPS)},
        "grad_norm.norm": {f"layers.{i}.weight": noisy() for i in range(parameters)},
        "grad_norm.max_abs": {f"layers.{i}.weight": noisy(0.1) for i in range(parameters)},
        "grad_norm.nonfinite": {f"layers.{i}.weight": np.zeros(STEPS) for i in range(parameters)},
        "grad_norm_total.norm": {"": noisy(2.0)},
        "learning_rate.lr": {"group[0]": np.full(STEPS, 1e-3)},
        "step_time.seconds": {"": rng.normal(0.01, 1e-4, STEPS)},
    }


def jump(parameters: int = 4) -> dict[str, dict[str, Array]]:
    """`quiet`, but for one batch whose inputs are 100 times too large."""
    series = quiet(parameters)
    for ref, factor in (("input_rms.rms", 100), ("loss.value", 40), ("grad_norm.norm", 60), ("grad_norm.max_abs", 60)):
        for values in series[ref].values():
            values[JUMP] *= factor
    return series


def write(folder: Path, series: Series, close: str | None = "finished", facts: Any = None, **fields: Any) -> Path:
    """Record ``series`` as a run; ``close=None`` leaves it running."""
    names = list(series["grad_norm.norm"])
    writer = RunWriter.create(folder, script="train.py")
    writer.update(
        facts=facts
        or {
            "class": "Net",
            "modules": [{"name": "", "class": "Net", "parameters": 0}],
            "parameters": [
                {"name": n, "numel": 1000, "trainable": True, "optimizer": 0, "group": 0, "tied_to": []} for n in names
            ],
            "optimizers": [{"class": "AdamW", "groups": [{"lr": 1e-3}]}],
        },
        **fields,
    )
    blocks = []
    for ref, modules in series.items():
        metric, _, column = ref.partition(".")
        values = np.stack(list(modules.values()), axis=1)
        has = np.ones(values.shape, dtype=np.bool_)
        blocks.append(ColumnBlock(metric, column, np.arange(STEPS, dtype=np.int64), tuple(modules), values, has))
    writer.append(blocks)
    writer.flush(force=True)
    if close is not None:
        writer.close(close, None)  # pyright: ignore[reportArgumentType]
    return writer.path


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A run with one incident: an input jump, then a loss and a gradient spike."""
    return write(tmp_path / "broken", jump(), overhead={"fraction": 0.0183, "steps": STEPS})


@pytest.fixture
def healthy(tmp_path: Path) -> Path:
    """A run with nothing to say."""
    return write(tmp_path / "healthy", quiet())


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs the command line in this process at 80 columns; the result has ``exit_code``, ``output`` and ``stderr``."""
    from typer.testing import CliRunner

    from monitor_cli.app import app

    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    return lambda *args: CliRunner().invoke(app, [str(a) for a in args], prog_name="monitor")
