"""Runs for the dashboard to show: written by the real writer from rows made by formula."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from monitor.block import ABSENT, Layout, RawBlock, Segment, evaluate
from monitor.diagnosis.engine import Engine, rules_hash
from monitor.metric import load_metrics
from monitor.rule import load_rules
from monitor.store.writer import RunWriter

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
        self._step = 0
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
            row = self._row(self._step)
            self.writer.tail.row(self._step, self.layout.number, row.tobytes())
            self._pending.append((self._step, row))
            self._step += 1
        return self

    def flush(self) -> Scripted:
        """Move what is in the tail to a part, findings included."""
        at, rows = zip(*self._pending, strict=True)
        self._pending = []
        block = RawBlock(self.layout, np.array(at), np.stack(rows))
        columns = evaluate(block, [m for m in load_metrics().values() if self._reads(m)])
        self.writer.tail.rotate(self._step)
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
