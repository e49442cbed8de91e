"""What ``monitor inspect --json`` prints: schema 1, one object.

    schema      1. Keys may be added within a schema; none changes its meaning or goes
    run         path, name, status, live, model, parameters, script, started (ISO 8601, UTC), seconds, attempts,
                first_step, last_step, error, overhead (as measured), absent (what, why), warnings, numbers (the
                table of the screen: series, module, unit, n, nonfinite, first, last, min, max)
    steps       recorded steps
    verdict     level ("healthy", "info", "warning", "critical", "not_enough_evidence") and text
    remarks     "phases", "attention", "routing", "curvature" -> what is remarkable there and no incident tells
    incidents   worst first: severity, head (a finding), consequences (findings), remedies of the head (text,
                import_path), refute (what would show the head to be wrong)
    findings    every finding, the earliest first: rule, title, severity, site, module ("" is the whole run), attempt,
                first_step, last_step, peak_step, open, count, value, threshold, evidence (name -> number), order, text
                (one sentence), thresholds (name, value, unit, source: where the threshold comes from), experimental
    unjudged    rule -> why it could not decide
    skipped     those of them that judge what the run does not have (no router, no attention, …)

NaN and infinities are the strings "nan", "inf" and "-inf", so that every JSON parser reads it. Names stand as they were
recorded; whoever shows them in a terminal must escape them.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from datetime import UTC
from typing import Any

from monitor.diagnosis.finding import Finding, Incident
from monitor.diagnosis.report import describe
from monitor_cli.view import Number, View, thresholds

SCHEMA = 1


def dumps(view: View) -> str:
    """``view`` as one line of strict ASCII JSON."""
    return json.dumps(strict(document(view)), allow_nan=False)


def document(view: View) -> dict[str, Any]:
    """``view`` as plain data; numbers may still be NaN or infinite."""
    run, verdict = view.run, view.verdict
    return {
        "schema": SCHEMA,
        "run": {
            "path": str(run.path),
            "name": run.name,
            "status": run.status,
            "live": run.is_live,
            "model": view.model,
            "parameters": view.parameters,
            "script": run.info["script"],
            "started": view.started.astimezone(UTC).isoformat() if view.started else None,
            "seconds": view.seconds,
            "attempts": run.attempts,
            "first_step": run.first_step,
            "last_step": run.last_step,
            "error": view.error,
            "overhead": dict(view.overhead),
            "absent": [{"what": what, "why": why} for what, why in view.absent],
            "warnings": list(run.warnings),
            "numbers": [_number(n) for n in (*view.curve, *view.numbers)],
        },
        "steps": run.steps,
        "verdict": {"level": verdict.level, "text": verdict.text},
        "remarks": {r.family: r.text for r in view.remarks},
        "incidents": [_incident(view, i) for i in verdict.incidents],
        "findings": [_finding(view, f) for f in run.findings()],
        "unjudged": dict(verdict.unjudged),
        "skipped": list(verdict.inapplicable),
    }


def _incident(view: View, incident: Incident) -> dict[str, Any]:
    rule = view.rules.get(incident.head.rule)
    return {
        "severity": incident.severity,
        "head": _finding(view, incident.head),
        "consequences": [_finding(view, f) for f in incident.consequences],
        "remedies": [dataclasses.asdict(r) for r in rule.remedies] if rule else [],
        "refute": rule.refute if rule else "",
    }


def _finding(view: View, f: Finding) -> dict[str, Any]:
    rule = view.rules.get(f.rule)
    return dataclasses.asdict(f) | {
        "text": describe(f, rule),
        "thresholds": [dataclasses.asdict(p) | {"value": float(p.value)} for p in thresholds(f, rule)] if rule else [],
        "experimental": rule.experimental if rule else False,
    }


def _number(n: Number) -> dict[str, Any]:
    s = n.summary
    return {"series": n.ref, "module": s.module, "unit": n.unit} | {
        name: getattr(s, name) for name in ("n", "nonfinite", "first", "last", "min", "max")
    }


def strict(value: Any) -> Any:
    """``value`` with text in place of every number that JSON cannot hold."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [strict(v) for v in value]
    return value
