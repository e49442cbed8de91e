"""The words of the page as HTML: verdict, incidents, what was recorded. Every text passes `escape.html`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath

from monitor.diagnosis.comparison import (
    CALIBRATION,
    LOGIT_LIMIT,
    Comparison,
    Difference,
    Extrapolation,
    Parting,
    Row,
    apart,
    first_of_each,
    same,
    stays,
)
from monitor.diagnosis.finding import Finding, Incident, Verdict
from monitor.diagnosis.incident import together
from monitor.diagnosis.remarks import Remark
from monitor.diagnosis.report import describe
from monitor.diagnosis.text import number, place, plain, when
from monitor.rule import Rule
from monitor.store.run import Run
from monitor_dashboard.escape import html, markdown

WORDS = {
    "healthy": "Healthy",
    "info": "Note",
    "warning": "Warning",
    "critical": "Critical",
    "not_enough_evidence": "Not enough evidence",
}
_COLOUR = {"critical": "red", "warning": "orange", "info": "blue"}


def table(rows: Iterable[tuple[object, object]], *, words: bool = False) -> str:
    """Two columns, name and value; values stand at the right unless they are ``words``."""
    body = "".join(f"<tr><td>{html(name)}</td><td>{html(value)}</td></tr>" for name, value in rows)
    return f'<table class="mon-table{" words" if words else ""}">{body}</table>' if body else ""


def verdict(v: Verdict) -> str:
    """The verdict as one coloured line."""
    return f'<div class="mon-verdict level-{v.level}"><span class="word">{WORDS[v.level]}</span>{html(v.text)}</div>'


def remarks(several: Sequence[Remark]) -> str:
    """What is remarkable, a line each; nothing if nothing is."""
    lines = [f"<div><b>{html(r.family)}</b> &ensp;{html(r.text)}</div>" for r in several]
    return f'<div class="mon-remarks">{"".join(lines)}</div>' if lines else ""


def incident_label(i: int, incident: Incident, rules: Mapping[str, Rule]) -> str:
    """Markdown label of an incident's expander: number as on the chart, title, steps."""
    head = incident.head
    steps = when(head, rules.get(head.rule))
    return f":{_COLOUR[incident.severity]}-badge[{i}] **{markdown(head.title, 60)}**  {markdown(steps)}"


def incident(incident: Incident, rules: Mapping[str, Rule]) -> str:
    """What was found with its numbers, what belongs to it, what to do and what would refute it."""
    head = incident.head
    rule = rules.get(head.rule)
    parts = [f"<p>{html(describe(head, rule))}</p>", table(_where(head, rule))]
    if incident.consequences:
        parts.append(_items("In the same incident", _consequences(incident, rules)))
    if rule is None:
        parts.append(f"<p>Rule {html(head.rule)} is not known to this version, so its remedy is not either.</p>")
    else:
        parts.append(_items("What to do", [_remedy(r.text, r.import_path) for r in rule.remedies]))
        parts.append(_items("What would refute it", [html(rule.refute)]))
    return f'<div class="mon-incident">{"".join(parts)}</div>'


def incidents(several: Sequence[Incident], rules: Mapping[str, Rule]) -> str:
    """Many incidents, a line each: when, what, where."""
    heads = [i.head for i in several]
    told = [(when(h, rules.get(h.rule)), f"{h.title} · {place(h)} · {number(h.value)}") for h in heads]
    return f'<div class="mon-incident">{table(told, words=True)}</div>'


def _where(finding: Finding, rule: Rule | None) -> list[tuple[str, str]]:
    rows = [("where", place(finding)), ("when", when(finding, rule))]
    if finding.count > 1:
        rows += [("worst at step", f"{finding.peak_step:,}"), ("points", f"{finding.count:,}")]
    return rows


def _consequences(incident: Incident, rules: Mapping[str, Rule]) -> list[str]:
    """What else belongs to an incident, as HTML: each rule once, by the first of its findings."""
    found = []
    for first, more in together(incident.consequences):
        words = [when(first, rules.get(first.rule)), place(first), number(first.value)]
        words += [f"and {more:,} more"] if more else []
        title = f'<span class="level-{first.severity} mon-level">{html(first.title, 60)}</span>'
        found.append(" · ".join([title, *map(html, words)]))
    return found


def _remedy(text: str, path: str) -> str:
    return html(text) + (f" <code>{html(path)}</code>" if path else "")


def _items(title: str, items: list[str]) -> str:
    """A heading and a list; ``items`` are HTML already."""
    return f"<h5>{title}</h5><ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>"


def heading(text: str) -> str:
    """A small heading of our own words."""
    return f'<div class="mon-title">{html(text)}</div>'


def grid(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: range) -> str:
    """A table with a line of headings; cells are HTML already.

    Args:
        heads: headings, HTML too.
        rows: as many cells each.
        numbers: the columns that hold numbers, which stand at the right.
    """

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(f"<{tag}{' class=n' if i in numbers else ''}>{cell}</{tag}>" for i, cell in enumerate(row))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="mon-wide"><table class="mon-grid"><tr>{cells("th", heads)}</tr>{body}</table></div>'


def runs(rows: Sequence[Row], logged: Sequence[str], colours: Sequence[str]) -> str:
    """Runs side by side, each with its colour, its last values and its verdict."""
    heads = ["run", "status", "steps", "loss", *(html(m, 20) for m in logged), "peak lr", "parameters", "verdict"]
    shown = []
    for row, colour in zip(rows, colours, strict=True):
        said = f'<span class="mon-level level-{row.level}"><b>{WORDS[row.level]}</b></span>'
        said += f" step {row.onset:,}" if row.onset is not None else ""
        shown.append([
            run_name(row.name, colour), html(row.status, 20), f"{row.steps:,}",
            "" if row.loss is None else number(row.loss),
            *(number(row.logged[m]) if m in row.logged else "" for m in logged),
            "" if row.rate is None else f"{row.rate:g}", f"{row.parameters:,}" if row.parameters else "",
            f"{said} {html(row.head, 60)}",
        ])  # fmt: skip
    return grid(heads, shown, range(2, 6 + len(logged)))


def run_name(name: str, colour: str) -> str:
    """A run's name behind the colour of its lines."""
    return f'<span class="dot" style="background: {colour}"></span>{html(name, 40)}'


def differs(found: Comparison) -> str:
    """What is known about the runs and is not the same in all of them."""
    if not found.differs:
        return line("Nothing that is known about the runs differs.")
    heads = ["differs", *(html(row.name, 40) for row in found.rows)]
    rows = [[html(fact, 40), *(html(t, 60) or "–" for t in texts)] for fact, texts in found.differs.items()]
    return grid(heads, rows, range(0))


def parting(p: Parting, most: int) -> str:
    """Where a run is not the same as the first one any more; of many series, the first of each metric."""
    rows = [("same", html(same(p)))]
    if p.first:
        rows.append(("first", _differences(p.first, most)))
        if p.start:
            rows.append(("outside", f"{len(p.start):,} of {p.judged:,} series from the start"))
        rows.append(("parts", _differences(p.later, most) if p.later else html(stays(p))))
        if p.later and p.identical_until is None:
            rows.append(("", html(CALIBRATION)))
    body = "".join(f"<tr><td>{name}</td><td>{text}</td></tr>" for name, text in rows)
    return f'<div class="mon-incident"><table class="mon-table words">{body}</table></div>'


def _differences(several: Sequence[Difference], most: int) -> str:
    shown = first_of_each(several)[:most]
    lines = [f"step {d.step:,} · {html(d.ref, 40)} {html(d.module, 40)}<br>{html(apart(d))}" for d in shown]
    if hidden := len(several) - len(shown):
        lines.append(f"and {hidden:,} more series")
    return "".join(f"<div>{text}</div>" for text in lines)


def extrapolation(e: Extrapolation) -> str:
    """Attention logits of growing models, and what they come to at the next size."""
    told = (
        "sizes too much alike, or a logit not above 0"
        if math.isnan(e.predicted)
        else f"{number(e.predicted)} predicted"
    )
    rows = [["largest logit", *(number(v) for v in e.logits), told]]
    heads = ["parameters", *(f"{n:,}" for n in e.parameters), f"{e.size:,}"]
    title = f"Attention logits against size at peak lr {e.rate:g}, step {e.step:,}, first block"
    limit = f"above {number(LOGIT_LIMIT)} every run diverged (arXiv 2309.14322): QK-norm before that size"
    return heading(title) + grid(heads, rows, range(1, len(heads))) + (line(limit) if e.beyond else "")


def line(text: str) -> str:
    """One faint line."""
    return f'<div class="mon-line">{html(text)}</div>'


def head(run: Run) -> str:
    """State and size of a run on one line."""
    live = run.is_live
    state = "recording" if live else run.status
    level = {"failed": "critical", "died": "critical", "interrupted": "warning"}.get(
        state, "info" if live else "healthy"
    )
    facts = [counted(run.steps, "step")]
    if run.steps > 1:
        facts.append(f"steps {run.first_step:,}–{run.last_step:,}")
    if run.attempts > 1:
        facts.append(f"{run.attempts} attempts")
    shown = "".join(f'<span class="fact">{html(fact)}</span>' for fact in facts)
    return f'<div class="mon-head"><span class="live level-{level}">{html(state)}</span>{shown}</div>'


def recording(run: Run, warnings: Sequence[str]) -> str:
    """What was recorded and what that cost, what was absent and why, and every warning (drops are among them)."""
    info, facts = run.info, run.facts
    begun = info["created"][:16].replace("T", " ") + " UTC"
    rows: list[tuple[str, object]] = [("script", PurePath(info["script"]).name), ("started", begun)]
    if parameters := facts.get("parameters", []):
        sizes = [p.get("numel") for p in parameters]
        words = [facts.get("class"), counted(len(parameters), "tensor")]
        words += [f"{sum(sizes):,} parameters"] if all(isinstance(n, int) for n in sizes) else []
        rows.append(("model", " · ".join(str(w) for w in words if w)))
    rows += [("optimizer", o.get("class", "unknown")) for o in facts.get("optimizers", [])]
    if isinstance(cost := info["overhead"].get("fraction"), int | float):
        rows.append(("measured overhead", f"{cost:.1%}"))
    if info["versions"]:
        rows.append(("versions", ", ".join(f"{key} {value}" for key, value in info["versions"].items())))
    parts = [table(rows)]
    if missed := [(a["what"], a["why"]) for a in info["absent"]]:
        parts.append(heading("Not recorded") + table(missed, words=True))
    if warnings:
        parts.append(heading("Warnings") + "".join(line(w) for w in warnings))
    return "".join(parts)


def name(text: object) -> str:
    """A name for a widget that shows text as it is."""
    return plain(text, 120)


def heading_of(module: str) -> str:
    """A small heading that is a recorded name, in its own case."""
    return f'<div class="mon-module">{html(module, 120)}</div>'


def counted(n: int, what: str) -> str:
    """A number of things: "1 step", "2 steps"."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def problem(text: str, *, run: bool = False) -> str:
    """The one line that stands in place of a page; ``run`` if there is a run, and the fault is not its own."""
    what = "This page cannot be shown" if run else "No run to show"
    return f'<div class="mon-verdict level-warning"><span class="word">{what}</span>{html(text)}</div>'
