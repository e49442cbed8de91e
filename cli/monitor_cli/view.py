"""What is shown of a run, gathered once: the screen and ``--json`` are both made from a `View` and cannot disagree."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from monitor.diagnosis.finding import Finding, Verdict
from monitor.diagnosis.remarks import Remark, remarks
from monitor.metric import load_metrics
from monitor.rule import Param, Rule, load_rules
from monitor.store.run import Run
from monitor.store.summary import SeriesSummary

#: The column whose curve heads the screen.
CURVE = "loss.value"
#: What the table shows where it was recorded, in this order: a column, and of its modules all, or the one that reached
#: the largest or the smallest value. ``--all`` shows every metric that is drawn as lines.
KEY: tuple[tuple[str, Literal["all", "largest", "smallest"]], ...] = (
    ("logged.value", "all"),
    ("train_accuracy.accuracy", "all"),
    ("grad_norm_total.norm", "all"),
    ("logit_norm.mean", "all"),
    ("loss_zero_frac.frac", "all"),
    ("attn_logit_max.lse_max", "largest"),
    ("attn_entropy.normalised", "smallest"),
    ("router_balance.cv", "largest"),
    ("residual_stream.rms", "largest"),
    ("norm_layer.rms", "largest"),
    ("memorisation.fraction", "all"),
    ("sharpness.value", "largest"),
    ("edge_of_stability.ratio", "largest"),
    ("learning_rate.lr", "all"),
    ("loss_scale.scale", "all"),
    ("step_time.seconds", "all"),
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
        remarks: what is remarkable in it and no incident tells.
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
    remarks: tuple[Remark, ...]
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
    """Gather what is shown of ``run``; reads summaries and findings, of series what `remarks` says.

    Args:
        run: an open run.
        everything: take every metric drawn as lines, not what `KEY` says.
    """
    info, facts = run.info, run.facts
    known = load_metrics()
    recorded = {f"{m}.{c}" for m, columns in run.metrics().items() for c in columns}
    mains = [(f"{name}.{known[name].plot.column}", "all") for name in run.metrics() if name in known]
    verdict = run.verdict()
    lines = [(ref, which) for ref, which in mains if known[ref.partition(".")[0]].plot.kind == "line"]
    return View(
        run=run,
        verdict=verdict,
        remarks=remarks(run, verdict),
        rules=load_rules(),
        curve=_numbers(run, CURVE, "all"),
        numbers=tuple(
            n
            for ref, which in (lines if everything else KEY)
            if ref in recorded and ref != CURVE
            for n in _numbers(run, ref, which)
        ),
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


def _numbers(run: Run, ref: str, which: str) -> tuple[Number, ...]:
    """The series of a column, or the one that went furthest; none if this version does not know the column."""
    name, _, column = ref.partition(".")
    m = load_metrics().get(name)
    unit = next((c.unit for c in m.columns if c.name == column), None) if m else None
    if m is None or unit is None:
        return ()
    found = run.summary(ref)
    if which == "largest":
        found = sorted(found, key=lambda s: -math.inf if math.isnan(s.max) else s.max)[-1:]
    elif which == "smallest":
        found = sorted(found, key=lambda s: math.inf if math.isnan(s.min) else s.min)[:1]
    return tuple(Number(ref, unit, m.plot.log, s) for s in found)


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
