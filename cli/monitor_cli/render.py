"""What the commands print. Everything is laid out by `rich` without boxes; every name goes through `plain` first."""

from __future__ import annotations

import inspect
import itertools
import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from monitor.block import Steps
from monitor.diagnosis.finding import Finding, Incident
from monitor.diagnosis.incident import together
from monitor.diagnosis.report import describe
from monitor.diagnosis.text import BADGES, duration, number, place, plain, when
from monitor.errors import RunFormatError
from monitor.metric import Metric
from monitor.rule import HEADINGS, Remedy, Rule
from monitor.store.parts import Values
from monitor.store.run import open_run
from monitor_cli.view import KEY, Number, View, started

BLOCKS = "▁▂▃▄▅▆▇█"
NONFINITE = "×"
#: A positive curve that spans more than this factor is drawn on a logarithmic scale.
SPAN = 100.0
#: A series in the table that moves less than this part of its size is drawn flat: its noise is no shape.
FLAT = 0.1

#: Incidents told in full, and in brief; the rest are counted.
FULL, BRIEF = 1, 2
#: Consequences, warnings and gaps shown before they are counted.
FEW = 4
#: Remedies shown before `monitor explain` is pointed at.
REMEDIES = 2
#: What "unjudged" and "skipped" say already.
THIN, BESIDE = "not enough evidence: ", "not applicable: "
#: Rows of the table of runs.
MANY = 12

#: Columns of which the table shows one module, and says which.
ONE_OF_MANY = {ref for ref, which in KEY if which != "all"}

COLOURS = {"healthy": "green", "info": "cyan", "warning": "yellow", "critical": "red", "not_enough_evidence": "magenta"}
LABEL = 9


class Frame(NamedTuple):
    """Steps and values that several curves share."""

    first: int
    last: int
    low: float
    high: float


def spark(steps: Steps, high: Values, last: int, width: int, log: bool, frame: Frame | None = None) -> str:
    """A curve as ``width`` blocks of eight levels, each the highest value of its steps, so that no spike is lost.

    Args:
        steps: ``(band,)`` first step of each band.
        high: ``(band,)`` float32, largest value in it; NaN or inf show as "×".
        last: last step of the curve.
        width: cells to fill; fewer if there are fewer bands.
        log: logarithmic scale; values ≤ 0 then stand on the floor.
        frame: what all cells together span, where it is not this curve alone; there is then a cell for each.

    Returns:
        The line; cells without a value are blank.
    """
    cells = min(width, len(steps)) if frame is None else width
    if cells < 1:
        return ""
    first, last = int(steps.min()), max(last, int(steps.max()))  # a resumed run may have gone back
    extremes = np.zeros(0, np.float32)
    if frame is not None:
        first, last = frame.first, frame.last
        extremes = np.array([frame.low, frame.high], np.float32)
    cell = (steps - first) * cells // (last - first + 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled, limits = (np.where(v > 0, np.log(v), -math.inf) if log else v for v in (high, extremes))
    drawn = scaled if frame is None else limits
    drawn = drawn[np.isfinite(drawn)]
    low, span = (float(drawn.min()), float(np.ptp(drawn))) if len(drawn) else (0.0, 0.0)
    line = [" "] * cells
    for c in range(cells):
        inside = cell == c
        if not np.isfinite(high[inside]).all():
            line[c] = NONFINITE
        elif inside.any():
            top = max(float(scaled[inside].max()), low)
            level = int((top - low) / span * len(BLOCKS)) if span else len(BLOCKS) // 2 if low else 0
            line[c] = BLOCKS[min(level, len(BLOCKS) - 1)]
    return "".join(line)


class Sparkline:
    """A series drawn as wide as the place it is given, at most 100 cells."""

    def __init__(self, series: Number, flat: float = 0.0) -> None:
        self.series = series
        s = series.summary
        low, high = s.min, s.max
        # what the definition asks for, or what the values ask for
        decades = bool(np.any((s.band.min > 0) & (s.band.min * SPAN < high)))
        self.flat = high - low <= flat * max(abs(low), abs(high))
        self.log = not self.flat and low >= 0 and high > 0 and (series.log or decades)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The line."""
        s = self.series.summary
        # of nothing but zeros every block is the lowest one, else the middle one
        high = np.where(np.isfinite(s.band.max), np.float32(s.max), s.band.max) if self.flat else s.band.max
        line = spark(s.band.steps, high, s.last_step, min(options.max_width, 100), self.log)
        text = Text(line, "cyan", no_wrap=True)
        text.highlight_regex(NONFINITE, "bold red")
        yield text


def screen(view: View, everything: bool = False) -> RenderableType:
    """All that `monitor inspect` shows of one run.

    Args:
        view: the run.
        everything: shorten nothing.
    """
    blocks = [_header(view), *_curves(view), _verdict(view), _remarks(view), *_incidents(view, everything)]
    blocks += [_numbers(view, everything), _notes(view, everything)]
    return Group(*[part for b in blocks if b is not None for part in ("", b)][1:])


def watched(view: View, everything: bool) -> RenderableType:
    """`screen`, and how to leave it."""
    return Group(screen(view, everything), Text("\nlive; Ctrl-C leaves, the training goes on", "dim italic"))


def runs(paths: Sequence[Path], everything: bool) -> RenderableType:
    """A table of runs, newest first; one that cannot be read is named as such."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True, justify="right")
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_row(*(Text(t, "dim") for t in ("run", "status", "steps", "begun", "verdict")))
    shown = paths if everything else paths[:MANY]
    for path in shown:
        try:
            run = open_run(path)
            begun = started(run)
            grid.add_row(
                Text(plain(run.name, 32)),
                Text(plain(run.status, 12)),
                f"{run.steps:,}",
                f"{begun:%Y-%m-%d %H:%M}" if begun else "",
                badge(run.verdict().level),
            )
        except RunFormatError:
            grid.add_row(Text(plain(path.name, 32)), "unreadable", "", "", Text("inspect it to see why", "dim"))
    if len(paths) > len(shown):
        return Group(grid, Text(f"… and {len(paths) - len(shown)} older, --all lists them", "dim"))
    return grid


def badge(level: str) -> Text:
    """A level as a shape, a word and a colour."""
    return Text(BADGES[level], f"bold {COLOURS[level]}")


def _header(view: View) -> RenderableType:
    run = view.run
    first = Text.assemble((plain(run.name, 50), "bold"))
    for part in (plain(view.model, 30), f"{view.parameters:,} parameters" if view.parameters else ""):
        first.append(f"  {part}" if part else "")
    parts = [plain(run.status), f"{run.steps:,} step{'s' if run.steps != 1 else ''}"]
    if view.seconds:
        parts[0] += f" {'for' if run.is_live else 'after'} {duration(view.seconds)}"
    if run.attempts > 1:
        parts[-1] += f" in {run.attempts} attempts"
    if view.started:
        parts.append(f"begun {view.started:%Y-%m-%d %H:%M}")
    lines = [first, Text("  ".join(parts), "dim")]
    if view.error:
        lines.append(Text(plain(view.error, 300), "red"))
    return Group(*lines)


def _curves(view: View) -> Iterable[RenderableType]:
    for series in view.curve:
        s, line = series.summary, Sparkline(series)
        name = plain(s.module or s.metric, 30)
        said = f"{name}  {number(s.first)} → {number(s.last)}  min {number(s.min)}  max {number(s.max)}"
        if s.nonfinite:
            said += f"  {NONFINITE} {s.nonfinite:,} not finite"
        yield Group(Text(said + ("  log scale" if line.log else "")), line)


def _verdict(view: View) -> RenderableType:
    level, text = view.verdict.level, plain(view.verdict.text, 600)
    return labelled([(badge(level), Text(text, "bold"))], gap=2)


def _remarks(view: View) -> RenderableType | None:
    rows = [(caption(r.family), Text(plain(r.text, 300))) for r in view.remarks]
    return labelled(rows, gap=2) if rows else None


def _incidents(view: View, everything: bool) -> Iterable[RenderableType]:
    incidents = view.verdict.incidents
    full, brief = (len(incidents), 0) if everything else (FULL, BRIEF)
    for i, incident in enumerate(incidents[: full + brief]):
        yield _incident(view, incident, everything, brief=i >= full)
    rest = len(incidents) - full - brief
    if rest > 0:
        yield Text(f"… and {rest} more incidents, --all lists them", "dim")
    elif len(incidents) > full:
        yield Text("--all tells every incident in full", "dim")


def _incident(view: View, incident: Incident, everything: bool, brief: bool) -> RenderableType:
    head = incident.head
    rule = view.rules.get(head.rule)
    title = Text(plain(head.title), f"bold {COLOURS[incident.severity]}")
    for part in (incident.severity, when(head, rule), place(head)):
        title.append(f"  {part}", "not bold default")
    rows: list[tuple[RenderableType, RenderableType]] = [(caption("what"), _sentence(head, rule))]
    if brief:
        counted = [f"{1 + others:,} × {plain(f.title)}" for f, others in together(incident.consequences)]
        if counted:
            rows.append((caption("with"), Text(", ".join(counted))))
        return Group(title, Padding(labelled(rows), (0, 0, 0, 2)))
    if incident.consequences:
        # information may be older than the trouble it belongs to
        earlier = [f for f in incident.consequences if f.first_step < head.first_step]
        later = [f for f in incident.consequences if f.first_step >= head.first_step]
        rows += [
            (caption(label), _findings(view, some, everything))
            for label, some in (("before", earlier), ("then", later))
            if some
        ]
    if rule is not None:
        count = len(rule.remedies) if everything else REMEDIES
        rows += [(caption("or" if i else "do"), _remedy(r)) for i, r in enumerate(rule.remedies[:count])]
        if len(rule.remedies) > count:
            rows.append(("", Text(f"… and {len(rule.remedies) - count} more: monitor explain {rule.id}", "dim")))
        rows.append((caption("unless"), Text(rule.refute, "dim")))
    return Group(title, Padding(labelled(rows), (0, 0, 0, 2)))


def _sentence(f: Finding, rule: Rule | None) -> Text:
    text = Text(plain(describe(f, rule), 800))
    if f.peak_step != f.first_step:
        text.append(f" Worst at step {f.peak_step:,}.")
    return text


def _findings(view: View, findings: Sequence[Finding], everything: bool) -> RenderableType:
    """Findings a line each, those of one rule together."""
    groups = [(f, 0) for f in findings] if everything else together(findings)
    shown = groups if everything else groups[:FEW]
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column()
    grid.add_column(no_wrap=True)
    for f, others in shown:
        what = Text(plain(f.title), COLOURS[f.severity])
        if f.module:
            what.append(f"  {plain(f.module, 40)}", "default")
        if others:
            what.append(f" … and {others:,} more", "dim default")
        sign = ">" if f.value > f.threshold else "<" if f.value < f.threshold else "="
        against = number(f.value) if math.isnan(f.value) else f"{number(f.value)} {sign} {number(f.threshold)}"
        fact = (rule := view.rules.get(f.rule)) is not None and rule.audit is not None
        step = "wiring" if fact else f"step {f.first_step:,}"
        grid.add_row(step, what, Text(against, "dim"))
    hidden = len(findings) - len(shown)
    return Group(grid, Text(f"{hidden:,} more findings: --all lists them", "dim")) if hidden else grid


def _remedy(r: Remedy) -> Text:
    text = Text(r.text)
    if r.import_path:
        text.append(f"  {r.import_path}", "bold")
    return text


def _numbers(view: View, everything: bool) -> RenderableType | None:
    if not view.numbers:
        return None
    grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
    grid.add_column(max_width=46)  # where there is no room a name goes on below: a number cut off is another number
    for _ in range(3):
        grid.add_column(justify="right", no_wrap=True)
    grid.add_column(ratio=1, no_wrap=True, min_width=6)
    # what a narrow terminal cuts off goes last
    grid.add_row(*(Text(t, "dim") for t in ("", "last", "min", "max", "over time, the highest in each block")))
    for ref, group in itertools.groupby(view.numbers, key=lambda series: series.ref):
        several = list(group)
        shown = several if everything else several[:FEW]
        for series in shown:
            s = series.summary
            name = Text(ref)
            if len(several) > 1 or s.metric == "logged" or ref in ONE_OF_MANY:
                name.append(f" {plain(s.module, 20)}", "dim")
            if series.unit not in ("1", "fraction"):  # the name says it, and at 80 columns the curve needs the room
                name.append(f" [{series.unit}]", "dim")
            grid.add_row(name, number(s.last), number(s.min), number(s.max), Sparkline(series, FLAT))
        if len(several) > len(shown):
            grid.add_row(Text(f"… and {len(several) - len(shown)} more (--all)", "dim"))
    return grid


def _notes(view: View, everything: bool) -> RenderableType:
    rows: list[tuple[RenderableType, RenderableType]] = []
    fraction = view.overhead.get("fraction")
    if isinstance(fraction, int | float) and view.run.steps:
        rows.append((caption("cost"), Text(f"recording took {fraction:.1%} of the training time", "dim")))

    def add(label: str, lines: Sequence[str]) -> None:
        shown = lines if everything or len(lines) <= FEW else lines[: FEW - 1]
        if len(lines) > len(shown):
            shown = [*shown, f"… and {len(lines) - len(shown)} more, --all lists them"]
        if shown:
            rows.append((caption(label), Text("\n".join(shown), "dim")))

    add("absent", [f"{plain(what, 40)}: {plain(why)}" for what, why in view.absent])
    verdict = view.verdict
    if view.run.steps:
        add("unjudged", [f"{r}: {plain(why.removeprefix(THIN))}" for r, why in verdict.thin.items()])
    if everything:
        add("skipped", [f"{r}: {plain(verdict.unjudged[r].removeprefix(BESIDE))}" for r in verdict.inapplicable])
    add("warnings", [plain(w) for w in view.run.warnings])
    return labelled(rows)


def caption(text: str) -> Text:
    """What stands on the left of a line."""
    return Text(f"{text:<{LABEL}}", "dim")


def _unit(unit: str) -> str:
    return "" if unit == "1" else unit


def labelled(rows: Iterable[tuple[RenderableType, RenderableType]], gap: int = 1) -> Table:
    """Labels on the left, text that wraps under itself on the right."""
    grid = Table.grid(padding=(0, gap, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1)
    for label, text in rows:
        grid.add_row(label, text)
    return grid


def catalogue(metrics: Mapping[str, Metric], rules: Mapping[str, Rule]) -> RenderableType:
    """Every metric and rule with its title."""
    grid = Table.grid(padding=(0, 3, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True, style="dim")
    grid.add_column(ratio=1)
    grid.add_row(Text("rules", "bold"))
    for r in rules.values():
        grid.add_row(f"  {r.id}", r.severity, r.title)
    grid.add_row("")
    grid.add_row(Text("metrics", "bold"))
    for m in metrics.values():
        grid.add_row(f"  {m.id}", m.site, m.title)
    return Group(grid, Text("\nmonitor explain ID says more", "dim"))


def metric(m: Metric) -> RenderableType:
    """All that a metric's file says."""
    columns = Table.grid(padding=(0, 2, 0, 0))
    for c in m.columns:
        columns.add_row(Text(f"{m.id}.{c.name}", "bold"), Text(f"[{c.unit}]", "dim"), c.doc)
    rows: list[tuple[RenderableType, RenderableType]] = [
        (caption("site"), Text(m.site)),
        (caption("cost"), Text(m.cost)),
        (caption("source"), Text(m.source)),
    ]
    if m.needs:
        rows.append((caption("from"), Text(", ".join(m.needs) + "; computed when asked for, not stored")))
    return Group(_title(m.id, m.title), *_prose(m.doc), columns, "", labelled(rows))


def rule(r: Rule) -> RenderableType:
    """All that a rule's file says."""
    params = Table.grid(padding=(0, 2, 0, 0))
    for p in r.params:
        params.add_row(Text(p.name, "bold"), f"{number(p.value)} {_unit(p.unit)}".strip(), Text(p.source, "dim"))
    remedies = Table.grid(padding=(0, 2, 0, 0))
    for remedy in r.remedies:
        remedies.add_row("·", _remedy(remedy))
    rows: list[tuple[RenderableType, RenderableType]] = [
        (caption("severity"), Text(r.severity + (", experimental" if r.experimental else ""))),
        (caption("reads"), Text(", ".join(r.needs) or "facts of the run")),
        (caption("numbers"), params),
        (caption("remedies"), remedies),
        (caption("unless"), Text(r.refute)),
    ]
    return Group(_title(r.id, r.title), *_prose(r.doc), labelled(rows))


def _title(name: str, title: str) -> Text:
    return Text.assemble((name, "bold"), f"  {title}\n")


def _prose(doc: str) -> Iterable[RenderableType]:
    """A docstring for a terminal: headings stand out, formulas stay as they are, paragraphs take the width there is."""
    for heading, paragraph in paragraphs(doc):
        if heading:
            yield Text(heading, "bold")
        text = paragraph.replace("``", "").replace("`", "")
        formula = text.startswith(" ")
        shown = Text(textwrap.dedent(text) if formula else " ".join(text.split()))
        yield Padding(shown, (0, 0, 1, 4 if formula else 2 if heading else 0))


def paragraphs(doc: str) -> Iterable[tuple[str, str]]:
    """A metric's or rule's docstring as ``(heading, paragraph)``.

    The heading is "" but for the first paragraph below one of `HEADINGS`. A paragraph that begins with a space is a
    formula and keeps its lines.
    """
    for part in re.split(r"\n\s*\n", inspect.cleandoc(doc)):
        first, _, rest = part.partition("\n")
        if first.rstrip(":") in HEADINGS:
            yield first.rstrip(":"), textwrap.dedent(rest)
        else:
            yield "", part
