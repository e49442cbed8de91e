"""The page that opens first: what is wrong, where it began, and the series to judge it by."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from monitor.rule import load_rules
from monitor_dashboard import choose, data, figures, markup, panels, theme, window
from monitor_dashboard.data import View
from monitor_dashboard.figures import Panel, Pin
from monitor_dashboard.keys import Key
from monitor_dashboard.page import Page

#: Findings marked on one chart; the rest are counted.
MAX_PINS = 400


def page(view: View) -> None:
    """Draw the overview of one run."""
    if not view.run.steps:
        said = "No step has been recorded yet." if view.run.is_live else "No step was recorded."
        st.html(markup.line(said) + markup.recording(view.run, view.warnings))
        return
    with st.spinner("Judging the run …"):  # seconds, where its rules have changed since it was recorded
        said, beside = view.verdict, view.remarks
    st.html(markup.verdict(said) + markup.remarks(beside))
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
        signal = choose.one_of(Key.SIGNAL, list(metrics), "logit_norm", 190) if metrics else None
        log = loss is not None and st.toggle(
            "log loss", value=view.wide(data.main_column(loss)), key=Key.LOG, bind="query-params",
            width="content",
        )  # fmt: skip
    strips = []
    if loss:
        refs = data.columns(loss)
        strips.append(panels.strip(view, refs, steps, title=loss.id, caption=loss.title, log=log, height=190))
    if signal:
        strips.append(panels.of_metric(view, signal, steps, height=108))
    _strips(strips, panels.pins(view, steps), steps, Key.LINES)
    missing = [name for name in ("loss", "logit_norm") if name not in view.metrics]
    if missing:
        st.html(markup.line(f"Not recorded: {', '.join(missing)}"))
    return steps


def _strips(strips: Sequence[Panel | None], pins: list[Pin], steps: tuple[int, int], key: Key) -> None:
    drawn = [strip for strip in strips if strip]
    if not drawn:
        return
    window.chart(figures.lines(drawn, pins[:MAX_PINS], steps, theme.palette()), key)
    if len(pins) > MAX_PINS:
        st.html(markup.line(f"{len(pins) - MAX_PINS:,} more findings in these steps are not marked: look closer"))


def _parameters(view: View, steps: tuple[int, int]) -> None:
    """Modules × steps of one metric, and every such metric of one module below."""
    metrics = {m.id: m for m in view.plotted("heatmap")}
    if not metrics:
        st.html(markup.line("No metric was recorded for single parameters."))
        return
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        st.html(markup.heading("Parameters"), width="content")
        metric = metrics[choose.one_of(Key.METRIC, list(metrics), "grad_norm", 190)]
        ref = data.main_column(metric)
        modules = list(view.modules(ref))
        grid = view.grid(ref, *steps)
        preferred = _suspect(view, modules) or grid.modules[0]  # a row that the map shows
        module = choose.one_of(Key.MODULE, modules, preferred, 330)
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
    own = [panels.of_metric(view, name, steps, height=84, only=module) for name in metrics]
    _strips(own, panels.pins(view, steps, module), steps, Key.DETAIL)


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
    for i, incident in enumerate(incidents[: panels.TOLD], start=1):
        with st.expander(markup.incident_label(i, incident, rules), expanded=i == 1):
            st.html(markup.incident(incident, rules))
            first = min(f.first_step for f in incident.findings)
            last = max(f.last_step for f in incident.findings)
            margin = max(20, (last - first) // 5)
            st.button(
                "Show these steps", key=f"{Key.ZOOM}-{i}", type="tertiary", on_click=window.show,
                args=(max(0, first - margin), last + margin),
            )  # fmt: skip
    if rest := incidents[panels.TOLD :]:
        with st.expander(f"{len(rest):,} more"):
            st.html(markup.incidents(rest, rules))


def _recording(view: View) -> None:
    """What recording cost and what it missed."""
    st.html(markup.heading("Recording") + markup.recording(view.run, view.warnings))
    if view.verdict.thin:
        with st.expander(f"Not judged · {len(view.verdict.thin)}"):
            st.html(markup.table(view.verdict.thin.items(), words=True))


PAGE = Page("Overview", 0, page)
