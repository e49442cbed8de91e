"""Metrics as strips of lines and findings as pins, made alike on every page."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from monitor.diagnosis.report import describe
from monitor.rule import load_rules
from monitor_dashboard import data
from monitor_dashboard.data import View
from monitor_dashboard.figures import Panel, Pin

#: Lines in one strip; the rest are counted, and not read.
MAX_LINES = 8
#: Incidents with a number on a chart and a place of their own in the list; more of them cannot be told apart.
TOLD = 20
#: A logarithmic scale on which more than this share of a strip's values has no place is given up.
_PLACELESS = 0.25


def strip(
    view: View, refs: Sequence[str], steps: tuple[int, int], *, title: str, caption: str, log: bool = False,
    height: int = 84, only: Collection[str] | None = None,
) -> Panel | None:  # fmt: skip
    """Columns over steps, a line for each module; None if none of them was recorded.

    Args:
        view: the run.
        refs: columns of one metric, as ``"metric.column"``.
        steps: first and last step to show.
        title: name of the strip, plain text.
        caption: what it shows.
        log: a logarithmic scale, unless many values are not above 0.
        height: pixels, if the names of the lines do not need more.
        only: modules to draw; all without.
    """
    wished = None if only is None else frozenset(only)
    modules = {ref: [m for m in view.modules(ref) if wished is None or m in wished] for ref in refs}
    several = sum(len(found) > 1 for found in modules.values())
    wanted: dict[str, tuple[str, str]] = {}
    for ref, found in modules.items():
        column = ref.partition(".")[2]
        for module in found:
            name = column if len(found) == 1 else module if several == 1 else f"{module} {column}"
            wanted[name] = ref, module
    if not wanted:
        return None
    if len(wanted) > MAX_LINES:
        caption = f"{caption} ({MAX_LINES} of {len(wanted):,})"
    shown = list(wanted.items())[:MAX_LINES]
    drawn = {name: view.line(ref, module, *steps, log) for name, (ref, module) in shown}
    count, odd = (sum(n) for n in zip(*((v.count, v.odd_count) for v in drawn.values()), strict=True))
    if log and odd > _PLACELESS * count and any("≤ 0" in v.odd for v in drawn.values()):
        log = False
        drawn = {name: view.line(ref, module, *steps, log) for name, (ref, module) in shown}
    units = {data.unit(ref) for ref in refs}
    return Panel(title, caption, units.pop() if len(units) == 1 else "", drawn, log, height)


def of_metric(view: View, name: str, steps: tuple[int, int], *, height: int, only: str | None = None) -> Panel | None:
    """The default picture of a metric of ``view.metrics``; of one module if ``only`` is given."""
    metric = view.metrics[name]
    return strip(
        view, data.columns(metric), steps, title=metric.id, caption=metric.title, log=metric.plot.log, height=height,
        only=None if only is None else (only,),
    )  # fmt: skip


def pins(view: View, steps: tuple[int, int], module: str | None = None, *, numbered: bool = True) -> list[Pin]:
    """Findings within these steps: heads of incidents, with the number they have in the list, then the rest.

    Args:
        view: the run.
        steps: first and last step shown.
        module: only the findings of this one.
        numbered: False on a page without that list: all findings are marked alike.
    """
    heads, others = [], []
    rules = load_rules()
    for i, incident in enumerate(view.verdict.incidents, start=1):
        for finding in incident.findings:
            rule = rules.get(finding.rule)
            seen = finding.first_step <= steps[1] and finding.last_step >= steps[0]
            if seen and module in (None, finding.module) and (rule is None or rule.audit is None):  # a fact has no step
                first, last = max(finding.first_step, steps[0]), min(finding.last_step, steps[1])
                label = str(i) if numbered and i <= TOLD and finding is incident.head else ""
                pin = Pin(first, last, finding.severity, label, f"{finding.title}: {describe(finding, rule)}")
                (heads if label else others).append(pin)
    return heads + others
