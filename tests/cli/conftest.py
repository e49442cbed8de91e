"""Runs to look at, written by the library's own writer from made-up series."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pytest

from monitor.block import ColumnBlock
from monitor.diagnosis.engine import Engine, rules_hash
from monitor.metric import Array
from monitor.rule import load_rules
from monitor.store.writer import RunWriter

STEPS = 300
JUMP = 200

#: ``metric.column`` -> module -> one value per step.
Series = Mapping[str, Mapping[str, Array]]


class Record(Protocol):
    """Records a run under the test's folder and gives its path."""

    def __call__(
        self,
        name: str,
        *,
        jump: bool = True,
        parameters: int = 4,
        more: Series | None = None,
        close: Literal["finished", "failed", "interrupted"] | None = "finished",
        error: str | None = None,
        **fields: Any,
    ) -> Path: ...


def _series(parameters: int, jump: bool) -> dict[str, dict[str, Array]]:
    """A training in which nothing happens, or one batch has inputs that are 100 times too large."""
    rng = np.random.default_rng(0)
    falling = 0.2 + np.exp(-np.arange(STEPS) / 60)

    def noisy(scale: float = 1.0) -> Array:
        return scale * falling * rng.normal(1.0, 0.05, STEPS)

    names = [f"layers.{i}.weight" for i in range(parameters)]
    series = {
        "loss.value": {"": noisy(2.3)},
        "input_rms.rms": {"input[0]": rng.normal(1.0, 0.01, STEPS)},
        "input_rms.nonfinite": {"input[0]": np.zeros(STEPS)},
        "grad_norm.norm": {n: noisy() for n in names},
        "grad_norm.max_abs": {n: noisy(0.1) for n in names},
        "grad_norm.nonfinite": {n: np.zeros(STEPS) for n in names},
        "grad_norm_total.norm": {"": noisy(2.0)},
        "learning_rate.lr": {"group[0]": np.full(STEPS, 1e-3)},
        "step_time.seconds": {"": rng.normal(0.01, 1e-4, STEPS)},
    }
    if jump:
        factors = {"input_rms.rms": 100, "loss.value": 40, "grad_norm.norm": 60, "grad_norm.max_abs": 60}
        for ref, factor in factors.items():
            for values in series[ref].values():
                values[JUMP] *= factor
    return series


@pytest.fixture
def record(tmp_path: Path) -> Record:
    """Records ``runs/<name>``; ``close=None`` leaves the run going, written by this process."""

    def one(
        name: str,
        *,
        jump: bool = True,
        parameters: int = 4,
        more: Series | None = None,
        close: Literal["finished", "failed", "interrupted"] | None = "finished",
        error: str | None = None,
        **fields: Any,
    ) -> Path:
        series: dict[str, Mapping[str, Array]] = {**_series(parameters, jump), **(more or {})}
        writer = RunWriter.create(tmp_path / "runs" / name, script="train.py")
        facts = {
            "class": "Net",
            "modules": [{"name": "", "class": "Net", "parameters": 0}],
            "parameters": [
                {"name": n, "numel": 1000, "trainable": True, "optimizer": 0, "group": 0, "tied_to": []}
                for n in series["grad_norm.norm"]
            ],
            "optimizers": [{"class": "AdamW", "groups": [{"lr": 1e-3}]}],
        }
        writer.update(**({"facts": facts, "overhead": {"fraction": 0.0183}} | fields))
        steps = np.arange(STEPS, dtype=np.int64)
        blocks = []
        for ref, modules in series.items():
            values = np.stack(list(modules.values()), axis=1)
            has = np.ones(values.shape, dtype=np.bool_)
            metric, _, column = ref.partition(".")
            blocks.append(ColumnBlock(metric, column, steps, tuple(modules), values, has))
        # as the recorder does, so that a reader need not judge again
        rules = load_rules()
        engine = Engine(rules, fields.get("facts", facts))
        engine.feed(blocks)
        writer.findings(engine.findings(), engine.state(), rules_hash(rules))
        writer.append(blocks)
        writer.flush(force=True)
        if close is not None:
            writer.close(close, error)
        return writer.path

    return one


class Result(Protocol):
    """What a command did."""

    @property
    def exit_code(self) -> int: ...
    @property
    def stdout(self) -> str: ...
    @property
    def stderr(self) -> str: ...
    @property
    def exception(self) -> BaseException | None: ...


Shell = Callable[..., Result]


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> Shell:
    """Runs a command line in this process, at 80 columns."""
    from typer.testing import CliRunner

    from monitor_cli.app import app

    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    return lambda *args: CliRunner().invoke(app, [str(a) for a in args], prog_name="monitor")
