"""The page that opens first: what is wrong, where it began, and the series to judge it by."""

from __future__ import annotations

from typing import Any

import streamlit as st

from monitor.diagnosis.report import describe
from monitor.metric import Metric
from monitor.rule import load_rules
from monitor_dashboard import data, figures, markup, theme, window
from monitor_dashboard.data import View
from monitor_dashboard.figures import Panel, Pin
from monitor_dashboard.keys import Key
from monitor_dashboard.page import Page
from monitor_dashboard.sampling import Line

#: Lines in one strip, and findings marked on it; the rest are counted.
MAX_LINES, MAX_PINS = 8, 400
#: A loss that spans this factor opens on a log scale.
DECADES = 100.0


def page(view: View) -> None:
    """Draw the overview of one run."""
    if not view.run.steps:
        st.html(markup.line("No step has been recorded yet.") + markup.recording(view.run, view.warnings))
        return
    st.html(markup.verdict(view.verdict))
    charts, words = st.columns([0.7, 0.3], gap="medium")
    with charts:
        steps = _series(view)
        _parameters(view, steps)
    with words:
        _incidents(view)
        _recording(view)


def _series(view: View) -> tuple[int, int]:
    """Loss and one other series of the whole run with the findings pinned to them; the steps that are shown."""
    metrics = {m.id: m for m in view.plotted("line")}
    loss = metrics.pop("loss", None)
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        steps = window.fields(view.span)
        signal = _choose(Key.SIGNAL, list(metrics), "logit_norm", 190) if metrics else None
        log = loss is not None and st.toggle(
            "log loss", value=view.decades(data.main_column(loss)) > DECADES, key=Key.LOG, bind="query-params",
            width="content",
        )  # fmt: skip
    panels = []
    if loss:
        panels.append(_panel(view, loss, steps, log=log, height=190))
    if signal:
        panels.append(_panel(view, metrics[signal], steps, log=metrics[signal].plot.log, height=108))
    if panels:
        _strips(panels, _pins(view, steps), steps, Key.LINES)
    missing = [name for name in ("loss", "logit_norm") if name not in view.metrics]
    if missing:
        st.html(markup.line(f"Not recorded: {', '.join(missing)}"))
    return steps


def _choose(key: Key, options: list[str], preferred: str, width: int, **more: Any) -> str:
    index = options.index(preferred) if preferred in options else 0
    return st.selectbox(
        key, options, index=index, key=key, bind="query-params", label_visibility="collapsed", width=width, **more
    )


def _strips(panels: list[Panel], pins: list[Pin], steps: tuple[int, int], key: Key) -> None:
    window.chart(figures.lines(panels, pins[:MAX_PINS], steps, theme.palette()), key)
    if len(pins) > MAX_PINS:
        st.html(markup.line(f"{len(pins) - MAX_PINS:,} more findings in these steps are not marked: look closer"))


def _lines(
    view: View, metric: Metric, steps: tuple[int, int], *, log: bool, only: str | None = None
) -> dict[str, Line]:
    """The lines of a metric by name; of the module ``only`` if given."""
    drawn: dict[str, Line] = {}
    refs = data.columns(metric)
    for ref in refs:
        modules = view.modules(ref) if only is None else (only,)
        column = ref.partition(".")[2]
        for module in modules:
            name = column if len(modules) == 1 else module if len(refs) == 1 else f"{module} {column}"
            drawn[name] = view.line(ref, module, *steps, log)
    return drawn


def _panel(
    view: View, metric: Metric, steps: tuple[int, int], *, log: bool, height: int, only: str | None = None
) -> Panel:
    drawn = _lines(view, metric, steps, log=log, only=only)
    title = metric.id if len(drawn) <= MAX_LINES else f"{metric.id} ({MAX_LINES} of {len(drawn)})"
    shown = dict(list(drawn.items())[:MAX_LINES])
    return Panel(title, metric.title, data.unit(metric), shown, log, height)


def _pins(view: View, steps: tuple[int, int], module: str | None = None) -> list[Pin]:
    """Findings within these steps: heads of incidents, numbered as in the list, then the rest; only of ``module``."""
    heads, others = [], []
    rules = load_rules()
    for i, incident in enumerate(view.verdict.incidents, start=1):
        for finding in incident.findings:
            rule = rules.get(finding.rule)
            seen = finding.first_step <= steps[1] and finding.last_step >= steps[0]
            if seen and module in (None, finding.module) and (rule is None or rule.audit is None):  # a fact has no step
                first, last = max(finding.first_step, steps[0]), min(finding.last_step, steps[1])
                label = str(i) if finding is incident.head else ""
                pin = Pin(first, last, finding.severity, label, f"{finding.title}: {describe(finding, rule)}")
                (heads if label else others).append(pin)
    return heads + others


def _parameters(view: View, steps: tuple[int, int]) -> None:
    """Modules × steps of one metric, and every such metric of one module below."""
    metrics = {m.id: m for m in view.plotted("heatmap")}
    if not metrics:
        st.html(markup.line("No metric was recorded for single parameters."))
        return
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        st.html(markup.heading("Parameters"), width="content")
        metric = metrics[_choose(Key.METRIC, list(metrics), "grad_norm", 190)]
        ref = data.main_column(metric)
        modules = list(view.modules(ref))
        module = _choose(Key.MODULE, modules, _suspect(view, modules), 330, format_func=markup.name)
        grid = view.grid(ref, *steps)
        note = "click a row for its series · drag a chart to look closer"
        if grid.hidden:
            note = f"{len(grid.modules)} of {len(modules):,} rows: those with the largest values"
        st.html(markup.line(note), width="content")
    figure, curves = figures.heat_map(grid, metric.title, module, steps, theme.palette(), log=metric.plot.log)
    st.plotly_chart(
        figure, key=Key.MAP, theme=None, config=figures.CONFIG, on_select=lambda: _clicked(curves),
        selection_mode="points",
    )  # fmt: skip
    st.html(markup.heading_of(module))
    own = [m for m in metrics.values() if module in view.modules(data.main_column(m))]
    panels = [_panel(view, m, steps, log=m.plot.log, height=84, only=module) for m in own]
    _strips(panels, _pins(view, steps, module), steps, Key.DETAIL)


def _clicked(curves: list[str]) -> None:
    points = st.session_state[Key.MAP].selection.points
    if points and curves[points[0]["curve_number"]]:
        st.session_state[Key.MODULE] = curves[points[0]["curve_number"]]


def _suspect(view: View, modules: list[str]) -> str:
    """The module that the worst incident names; "" if none does."""
    named = (f.module for incident in view.verdict.incidents for f in incident.findings)
    return next((module for module in named if module in modules), "")


def _incidents(view: View) -> None:
    incidents = view.verdict.incidents
    st.html(markup.heading(f"Incidents · {len(incidents)}" if incidents else "Incidents"))
    if not incidents:
        st.html(markup.line("None found."))
    rules = load_rules()
    for i, incident in enumerate(incidents, start=1):
        with st.expander(markup.incident_label(i, incident, rules), expanded=i == 1):
            st.html(markup.incident(incident, rules))
            first = min(f.first_step for f in incident.findings)
            last = max(f.last_step for f in incident.findings)
            margin = max(20, (last - first) // 5)
            st.button(
                "Show these steps", key=f"{Key.ZOOM}-{i}", type="tertiary", on_click=window.show,
                args=(max(0, first - margin), last + margin),
            )  # fmt: skip


def _recording(view: View) -> None:
    """What recording cost and what it missed."""
    st.html(markup.heading("Recording") + markup.recording(view.run, view.warnings))
    if view.verdict.thin:
        with st.expander(f"Not judged · {len(view.verdict.thin)}"):
            st.html(markup.table(view.verdict.thin.items(), words=True))


PAGE = Page("Overview", 0, page)
