"""Small series by formula, recorded ones from files, and the fold that the tests of rules and diagnosis share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from monitor.block import ColumnBlock
from monitor.diagnosis.engine import Engine
from monitor.diagnosis.finding import Finding
from monitor.rule import Rule

RECORDED = Path(__file__).parent.parent / "fixtures" / "series"
#: Trainings without a fault; each family of tests/fixtures/record_series.py with its first seed.
HEALTHY = (
    "bandit", "cosine_restarts", "diffusion", "digits_cnn", "digits_mlp", "gan", "grokking_weight_decay",
    "orthogonal_gradient", "rare_words", "recurrent", "regression", "sgd_batch8", "tiny_lm",
)  # fmt: skip

#: A value, or None where nothing was recorded.
Value = float | None


def column(
    ref: str,
    values: Sequence[Value] | Sequence[Sequence[Value]],
    modules: tuple[str, ...] = ("",),
    steps: Sequence[int] | None = None,
) -> ColumnBlock:
    """A column from numbers, ``(step,)`` or ``(step, module)``; ``steps`` from 0 on without."""
    rows = [v if isinstance(v, Sequence) else [v] for v in values]
    numbers = np.array([[np.nan if v is None else v for v in row] for row in rows], dtype=np.float64)
    has = np.array([[v is not None for v in row] for row in rows], dtype=np.bool_)
    metric, name = ref.split(".")
    at = np.arange(len(rows)) if steps is None else np.asarray(steps)
    return ColumnBlock(metric, name, at.astype(np.int64), modules, numbers, has)


@dataclass(frozen=True)
class Case:
    """What a rule must say of some series: ``found`` holds (module, first step) of every finding, in order."""

    why: str
    columns: tuple[ColumnBlock, ...] = ()
    found: tuple[tuple[str, int], ...] = ()
    severity: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


def recorded(name: str) -> list[ColumnBlock]:
    """The columns of a recorded training."""
    found = []
    with np.load(RECORDED / f"{name}.npz") as file:
        for key in file.files:
            if not key.endswith("/planes"):
                continue
            ref = key.removesuffix("/planes")
            bits = np.ascontiguousarray(file[key].transpose(1, 2, 0))  # (module, step, byte)
            values = bits.view(np.float32)[..., 0].T.astype(np.float64)
            has = np.ones(values.shape, dtype=np.bool_)
            if f"{ref}/has" in file.files:
                has = np.unpackbits(file[f"{ref}/has"], count=values.size).reshape(values.shape).astype(np.bool_)
            metric, name = ref.split(".")
            modules = tuple(str(m) for m in file[f"{ref}/modules"])
            found.append(ColumnBlock(metric, name, file[f"{ref}/steps"].astype(np.int64), modules, values, has))
    return found


def cut(columns: Iterable[ColumnBlock], first: int, end: int) -> list[ColumnBlock]:
    """The columns over the steps from ``first`` to before ``end``."""
    pieces = []
    for c in columns:
        rows = (c.steps >= first) & (c.steps < end)
        if rows.any():
            pieces.append(ColumnBlock(c.metric, c.column, c.steps[rows], c.modules, c.values[rows], c.has[rows]))
    return pieces


def end(columns: Iterable[ColumnBlock]) -> int:
    """One more than the last step."""
    return max((int(c.steps[-1]) + 1 for c in columns if len(c.steps)), default=0)


def fold(
    rules: Mapping[str, Rule], columns: Sequence[ColumnBlock], size: int = 50, facts: Mapping[str, Any] | None = None
) -> Engine:
    """The engine after all columns, fed ``size`` steps at a time."""
    engine = Engine(rules, facts or {})
    for first in range(0, end(columns), size):
        engine.feed(cut(columns, first, first + size))
    return engine


def places(findings: Iterable[Finding]) -> list[tuple[str, int]]:
    """Module and first step of each."""
    return [(f.module, f.first_step) for f in findings]
