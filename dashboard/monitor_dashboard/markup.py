"""The words of the page as HTML: verdict, incidents, what was recorded. Every text passes `escape.html`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from monitor.diagnosis.report import describe
from monitor.store.run import Run

from monitor.diagnosis.finding import Finding, Incident, Verdict
from monitor.diagnosis.text import number, place, plain, when
from monitor.rule import Rule
from monitor_dashboard.escape import html, markdown

WORDS = {
    "healthy": "Healthy",
    "info": "Note",
    "warning": "Warning",
    "critical": "Critical",
    "not_enough_evidence": "Not enough evidence",
}
_COLOUR = {"critical": "red", "warning": "orange", "info": "blue"}
#: Consequences listed under an incident; the rest are counted.
_SHOWN = 8


def table(rows: Iterable[tuple[object, object]], *, words: bool = False) -> str:
    """Two columns, name and value; values stand at the right unless they are ``words``."""
    body = "".join(f"<tr><td>{html(name)}</td><td>{html(value)}</td></tr>" for name, value in rows)
    return f'<table class="mon-table{" words" if words else ""}">{body}</table>' if body else ""


def verdict(v: Verdict) -> str:
    """The verdict as one coloured line."""
    return f'<div class="mon-verdict level-{v.level}"><span class="word">{WORDS[v.level]}</span>{html(v.text)}</div>'


def incident_label(i: int, incident: Incident) -> str:
    """Markdown label of an incident's expander: number as on the chart, title, steps."""
    head = incident.head
    return f":{_COLOUR[incident.severity]}-badge[{i}] **{markdown(head.title, 60)}**  {markdown(when(head))}"


def incident(incident: Incident, rules: Mapping[str, Rule]) -> str:
    """What was found, the numbers behind it, what followed, what to do and what would refute it."""
    head = incident.head
    rule = rules.get(head.rule)
    parts = [f"<p>{html(describe(head, rule))}</p>", table(_evidence(head))]
    if incident.consequences:
        shown = [_consequence(f) for f in incident.consequences[:_SHOWN]]
        more = len(incident.consequences) - len(shown)
        parts.append(_items("What followed", [*shown, *([f"… and {more:,} more"] if more else [])]))
    if rule is None:
        parts.append(f"<p>Rule {html(head.rule)} is not known to this version, so its remedy is not either.</p>")
    else:
        parts.append(_items("What to do", [_remedy(r.text, r.import_path) for r in rule.remedies]))
        parts.append(_items("What would refute it", [html(rule.refute)]))
        sources = "; ".join(f"{q.name} {number(q.value)} {q.unit}: {q.source}" for q in rule.params)
        parts.append(f'<h5>Threshold from</h5><span class="mon-source">{html(sources)}</span>')
        if rule.experimental:
            parts.append(
                '<p class="mon-source">Experimental: its thresholds have neither a source nor a calibration.</p>'
            )
    return f'<div class="mon-incident">{"".join(parts)}</div>'


def _evidence(finding: Finding) -> list[tuple[str, str]]:
    rows = [
        ("where", place(finding)),
        ("when", f"{when(finding)}, peak {finding.peak_step:,}"),
        ("measured", number(finding.value)),
        ("threshold", number(finding.threshold)),
    ]
    rows += [(name.replace("_", " "), number(value)) for name, value in finding.evidence.items()]
    return rows


def _consequence(finding: Finding) -> str:
    return (
        f'<span class="level-{finding.severity}" style="color:var(--level)">{html(finding.title, 60)}</span> · '
        f"{html(when(finding))} · {html(place(finding))} · {html(number(finding.value))}"
    )


def _remedy(text: str, path: str) -> str:
    return html(text) + (f" <code>{html(path)}</code>" if path else "")


def _items(title: str, items: list[str]) -> str:
    """A heading and a list; ``items`` are HTML already."""
    return f"<h5>{title}</h5><ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>"


def heading(text: str) -> str:
    """A small heading of our own words."""
    return f'<div class="mon-title">{html(text)}</div>'


def line(text: str) -> str:
    """One faint line."""
    return f'<div class="mon-line">{html(text)}</div>'


def head(run: Run) -> str:
    """State and size of a run on one line."""
    live = run.is_live
    state = "recording" if live else run.status
    level = {"failed": "critical", "interrupted": "warning"}.get(state, "info" if live else "healthy")
    facts = [f"{run.steps:,} steps"]
    if run.steps:
        facts.append(f"step {run.first_step:,} – {run.last_step:,}")
    if len(run.attempts) > 1:
        facts.append(f"{len(run.attempts)} attempts")
    shown = "".join(f'<span class="fact">{html(fact)}</span>' for fact in facts)
    return f'<div class="mon-head"><span class="live level-{level}">{html(state)}</span>{shown}</div>'


def recording(run: Run) -> str:
    """Rows and lines on what recording cost and what it missed."""
    return table(run.info.get("recording_rows", [])) + "".join(line(w) for w in run.warnings)


def name(text: object) -> str:
    """A name for a widget that shows text as it is."""
    return plain(text, 120)


def heading_of(module: str) -> str:
    """A small heading that is a recorded name, in its own case."""
    return f'<div class="mon-module">{html(module, 120)}</div>'


def problem(text: str) -> str:
    """The one line that stands in place of a page."""
    return f'<div class="mon-verdict level-warning"><span class="word">No run to show</span>{html(text)}</div>'
