"""What is shown of a run, gathered once: the screen and ``--json`` are both made from a `View` and cannot disagree."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from monitor.diagnosis.finding import Finding, Verdict
from monitor.metric import load_metrics
from monitor.rule import Param, Rule, load_rules
from monitor.store.run import Run, SeriesSummary

#: The metric whose curve heads the screen.
CURVE = "loss"
#: Metrics whose last values are shown, in this order. ``--all`` shows every metric that is drawn as lines.
KEY = (
    "logged",
    "train_accuracy",
    "grad_norm_total",
    "logit_norm",
    "loss_zero_frac",
    "learning_rate",
    "loss_scale",
    "step_time",
)


@dataclass(frozen=True)
class Number:
    """One series in the table of numbers."""

    ref: str
    unit: str
    log: bool
    summary: SeriesSummary


@dataclass(frozen=True)
class View:
    """A run as it is shown.

    Attributes:
        run: the run itself.
        verdict: what is wrong with it.
        rules: definitions by id; a finding of an older version may name one that is not there.
        curve: the loss, one per optimizer, or nothing if none was recorded.
        numbers: the table.
        model: class of the root module, "" if unknown.
        parameters: number of trained and frozen scalars.
        started: when the recording began, local time.
        seconds: how long it was recorded, all attempts together; a killed attempt does not count.
        error: what the last attempt ended with, "" if with nothing.
        overhead: what recording cost, as run.json has it.
        absent: ``(what, why)`` of what could not be recorded.
    """

    run: Run
    verdict: Verdict
    rules: Mapping[str, Rule]
    curve: tuple[Number, ...]
    numbers: tuple[Number, ...]
    model: str
    parameters: int
    started: datetime | None
    seconds: float
    error: str
    overhead: Mapping[str, Any]
    absent: tuple[tuple[str, str], ...]


def look(run: Run, everything: bool = False) -> View:
    """Gather what is shown of ``run``; reads summaries and findings, never whole series.

    Args:
        run: an open run.
        everything: take every metric drawn as lines, not only `KEY`.
    """
    info, facts = run.info, run.facts
    known = load_metrics()
    recorded = [name for name in run.metrics() if name in known]
    shown = [name for name in recorded if known[name].plot.kind == "line"] if everything else KEY
    return View(
        run=run,
        verdict=run.verdict(),
        rules=load_rules(),
        curve=_numbers(run, (CURVE,)),
        numbers=_numbers(run, [name for name in shown if name in recorded and name != CURVE]),
        model=str(facts.get("class", "")),
        parameters=sum(n for p in facts.get("parameters", ()) if isinstance(n := p.get("numel"), int)),
        started=started(run),
        seconds=_seconds(run),
        error=(info["attempts"][-1]["error"] or "") if info["attempts"] else "",
        overhead=info["overhead"],
        absent=tuple((str(a["what"]), str(a["why"])) for a in info.get("absent", ())),
    )


def started(run: Run) -> datetime | None:
    """When the recording began, if run.json says so."""
    return _time(run.info["created"])


def _numbers(run: Run, metrics: Iterable[str]) -> tuple[Number, ...]:
    found = []
    for m in (load_metrics()[name] for name in metrics):
        ref = f"{m.id}.{m.plot.column}"
        found += [Number(ref, m.column(m.plot.column).unit, m.plot.log, s) for s in run.summary(ref)]
    return tuple(found)


def _seconds(run: Run) -> float:
    total = 0.0
    for attempt in run.info["attempts"]:
        began, ended = _time(attempt["started"]), _time(attempt["ended"])
        if ended is None and run.is_live:
            ended = datetime.now(UTC)
        total += (ended - began).total_seconds() if began and ended else 0.0
    return total


def _time(text: str | None) -> datetime | None:
    """The time that ``text`` says, if it says one: run.json may come from anywhere."""
    try:
        return datetime.fromisoformat(text or "").astimezone()
    except (ValueError, OverflowError):
        return None


def thresholds(finding: Finding, rule: Rule) -> tuple[Param, ...]:
    """The parameters of ``rule`` that say where a finding's threshold comes from: those of its value, or else all."""
    return tuple(p for p in rule.params if math.isclose(p.value, finding.threshold)) or rule.params


def together(findings: Iterable[Finding]) -> list[tuple[Finding, int]]:
    """Findings of one rule as the earliest of them and the number of others, in the order of the earliest."""
    first: dict[str, Finding] = {}
    others: dict[str, int] = {}
    for f in findings:
        first.setdefault(f.rule, f)
        others[f.rule] = others.get(f.rule, -1) + 1
    return [(f, others[rule]) for rule, f in first.items()]
