"""What is known of each run at a glance: one row of the table per run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from monitor.diagnosis.comparison.settings import groups
from monitor.rule import load_rules

if TYPE_CHECKING:
    from monitor.store.run import Run

_HELD_OUT = ("val", "eval", "test")

Level = Literal["healthy", "info", "warning", "critical", "not_enough_evidence"]


@dataclass(frozen=True)
class Row:
    """One run in the table.

    Attributes:
        path: its folder.
        name: shortest name that tells it from the others.
        status: as `Run.status`.
        steps: recorded steps.
        first_step, last_step: the first and the last of them, None if there is none.
        loss: last recorded loss, NaN if it is not finite or there is none; ``nonfinite`` counts those that are not.
        nonfinite: losses that were NaN or infinite.
        logged: the last value of everything the script logged.
        shown: the last value of each column asked for, of several modules the largest; nothing where none was recorded.
        rate: peak learning rate, None if it is not known.
        parameters: number of scalars in the model, 0 if it is not known.
        level, text: of the verdict.
        onset: step at which the verdict's worst incident begins, None if there is none or it has no step.
        head: title of that incident, "" if there is none.
    """

    path: Path
    name: str
    status: str
    steps: int
    first_step: int | None
    last_step: int | None
    loss: float | None
    nonfinite: int
    logged: dict[str, float]
    shown: dict[str, float]
    rate: float | None
    parameters: int
    level: Level
    text: str
    onset: int | None
    head: str


def names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of ``paths``, in whole folders, that are all different (equal paths stay equal)."""
    depth = dict.fromkeys(paths, 1)
    while True:
        shown = {p: "/".join(p.parts[-d:]) for p, d in depth.items()}
        counted = Counter(shown.values())
        alike = [p for p in depth if counted[shown[p]] > 1 and depth[p] < len(p.parts)]
        if not alike:
            return [shown[p] for p in paths]
        for p in alike:
            depth[p] += 1


def logged_in(rows: Sequence[Row], part: float) -> list[str]:
    """What at least ``part`` of the scripts logged: what was measured on held-out data first, then the most common."""
    counted = Counter(m for row in rows for m in row.logged)
    several = sorted(counted, key=lambda m: (not m.lower().startswith(_HELD_OUT), -counted[m]))
    return [m for m in several if counted[m] >= part * len(rows)]


def row(run: Run, name: str, show: Sequence[str] = ()) -> Row:
    """The row of a run that is shown as ``name``, with the columns ``show``."""
    verdict = run.verdict()
    worst = verdict.incidents[0].head if verdict.incidents else None
    loss = next(iter(run.summary("loss.value")), None)
    last = None if loss is None else loss.last
    timed = worst is not None and not _about_facts(worst.rule)
    return Row(
        path=run.path,
        name=name,
        status=run.status,
        steps=run.steps,
        first_step=run.first_step,
        last_step=run.last_step,
        loss=last,
        nonfinite=loss.nonfinite if loss is not None else 0,
        logged={s.module: s.last for s in run.summary("logged.value")},
        shown={ref: float(max(ends)) for ref in show if (ends := _ends(run, ref))},
        rate=_rate(run),
        parameters=sum(n for p in run.facts.get("parameters", ()) if isinstance(n := p.get("numel"), int)),
        level=verdict.level,
        text=verdict.text,
        onset=worst.first_step if worst is not None and timed else None,
        head=worst.title if worst is not None else "",
    )


def _ends(run: Run, ref: str) -> list[float]:
    """The last values of a column, NaN only if there is no other."""
    ends = [s.last for s in run.summary(ref)]
    return [v for v in ends if not math.isnan(v)] or ends


def _about_facts(rule: str) -> bool:
    known = load_rules().get(rule)
    return known is not None and known.audit is not None


def _rate(run: Run) -> float | None:
    """Peak learning rate: the largest recorded, or else the largest that an optimizer was made with."""
    peaks = [s.max for s in run.summary("learning_rate.lr") if math.isfinite(s.max)]
    if not peaks:
        peaks = [float(g["lr"]) for g in groups(run.facts) if isinstance(g.get("lr"), int | float)]
    return float(f"{max(peaks):.6g}") if peaks else None  # a float32 of 1e-3 is not 1e-3
