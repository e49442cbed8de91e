"""Runs laid over each other: their verdicts, one series of all of them, and where each parts from the first.

The run chosen at the top of the page is the reference; what is said is what ``monitor compare`` says.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import streamlit as st

from monitor.diagnosis.comparison import PAIRS, Comparison, Difference, Parting, Row, apart, first_of_each, logged_in
from monitor.diagnosis.text import number
from monitor.errors import MonitorError
from monitor.metric import SITES, load_metrics
from monitor_dashboard import choose, data, figures, markup, sampling, theme, window
from monitor_dashboard.data import View
from monitor_dashboard.escape import markdown
from monitor_dashboard.figures import Envelope, Mark, Panel
from monitor_dashboard.keys import Key
from monitor_dashboard.page import Page

#: Series told of each parting, those offered as a button, and logged values with a column of their own.
MOST, OFFERED, LOGGED = 5, 3, 2
#: Runs laid beside the first unasked, the newest: each takes a third of a second, and a chart of few is read at once.
BESIDE = 3
#: So many facts that differ are shown unasked.
FEW = 10
ALONE = "A comparison needs two or more runs, and there is only this one: monitor dashboard takes a folder of runs."
FIRST = "loss.value"


class _Laid(NamedTuple):
    """A run laid over the reference: its row, its place among the runs, and where it parts."""

    row: Row
    place: int
    parting: Parting


def page(view: View) -> bool:
    """Draw a run beside others; True if one of the others is still being written."""
    paths = {name: path for name, path in data.list_runs(data.runs_root()).items() if path != view.run.path}
    if not paths:
        st.html(markup.line(ALONE))
        return False
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        st.html(markup.heading("Beside"), width="content")
        chosen = st.multiselect(
            Key.AGAINST, list(paths), default=list(paths)[:BESIDE], key=Key.AGAINST, bind="query-params",
            max_selections=PAIRS, label_visibility="collapsed", format_func=markup.name, placeholder="choose runs",
        )  # fmt: skip
    views, unreadable = [view], []
    for name in chosen:
        try:
            views.append(data.view(paths[name]))
        except (MonitorError, OSError) as e:
            unreadable.append((name, str(e)))
    if unreadable:
        st.html(markup.heading("Unreadable") + markup.table(unreadable, words=True))
    if len(views) < 2:
        st.html(markup.line("Choose one or more runs to lay beside this one."))
        return False
    found = data.compared(views)
    colours = list(itertools.islice(itertools.cycle(theme.palette().lines), len(views)))
    st.html(markup.runs(found.rows, logged_in(found.rows, 0.5)[:LOGGED], colours))
    charts, words = st.columns([0.66, 0.34], gap="medium")
    with charts:
        place = st.container()
        _sweep(found)
    with words:
        laid = _partings(found, views)
    with place:  # drawn last: it marks where the runs part
        _series(views, found, laid)
    with st.expander(f"What differs · {len(found.differs)}", expanded=0 < len(found.differs) <= FEW):
        st.html(markup.differs(found))
    return any(v.run.is_live for v in views[1:])


def _partings(found: Comparison, views: Sequence[View]) -> list[_Laid]:
    """Where each run parts from the first, and buttons that show the series in which it does."""
    st.html(markup.heading("Where they part from") + markup.heading_of(found.rows[0].name))
    laid = [_Laid(found.rows[i], i, data.laid_over(views[0], v)) for i, v in enumerate(views) if i]
    for row, i, p in laid:
        with st.expander(_label(row, p), expanded=i == 1):
            st.html(markup.parting(p, MOST))
            with st.container(gap=None):
                for n, d in enumerate(first_of_each(p.later or p.first)[:OFFERED]):
                    st.button(
                        f"Show {markdown(d.ref, 40)} {markdown(d.module, 30)}", key=f"{Key.COMPARED}-{i}-{n}",
                        type="tertiary", on_click=_choose, args=(d.ref, d.module),
                    )  # fmt: skip
    return laid


def _label(row: Row, p: Parting) -> str:
    """Markdown: the run and the step at which it parts."""
    if not p.series:
        said = "nothing in common"
    elif not p.first:
        said = "identical"
    elif p.later:
        said = f"parts at step {p.later[0].step:,}"
    else:
        said = "differs from the start" if p.identical_until is None else f"identical until {p.identical_until:,}"
    return f"**{markdown(row.name, 40)}**  {said}"


def _choose(ref: str, module: str) -> None:
    st.session_state[Key.SERIES], st.session_state[Key.SERIES_OF] = ref, module


def _series(views: Sequence[View], found: Comparison, laid: Sequence[_Laid]) -> None:
    """One series of every run on common steps, with the noise band of the first."""
    first = views[0]
    refs = _common(views)
    if not refs:
        st.html(markup.line("No series was recorded in this run and in another one."))
        return
    spans = [v.span for v in views if v.run.steps]
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        steps = window.fields((min(low for low, _ in spans), max(high for _, high in spans)))
        ref = choose.one_of(Key.SERIES, refs, FIRST, 250)
        shared = set().union(*(v.modules(ref) for v in views[1:]))
        modules = [m for m in first.modules(ref) if m in shared]
        module = modules[0]
        if len(modules) > 1:
            module = choose.one_of(Key.SERIES_OF, modules, module, 250)
    metric = load_metrics()[ref.partition(".")[0]]
    column = metric.column(ref.partition(".")[2])
    log = first.wide(ref, views[1:]) or (metric.plot.log and metric.plot.column == column.name)
    empty = sampling.line(np.zeros(0, np.int64), np.zeros(0), log=log)
    drawn = {
        row.name: v.line(ref, module, *steps, log) if module in v.modules(ref) else empty
        for row, v in zip(found.rows, views, strict=True)
    }
    noise = first.noise(ref, module, *steps, log)
    marks = [
        Mark(row.name, d.step, d.value, f"{row.name} parts at step {d.step:,}: {apart(d)}")
        for row, _, p in laid
        for d in _of(p.later, ref, module)
        if steps[0] <= d.step <= steps[1] and np.isfinite(d.value) and (d.value > 0 or not log)
    ]
    envelope = Envelope(*noise) if noise else None
    strip = Panel(ref, column.doc, data.unit(ref), drawn, log, 320, envelope, tuple(marks))
    window.chart(figures.lines([strip], [], steps, theme.palette()), Key.COMPARED)
    told = ["shaded: the noise band of the first run"] if noise else []
    told += ["circle: where a run leaves it for good"] if marks else []
    st.html(markup.line(" · ".join([*told, "drag to look closer"])))


def _of(several: Sequence[Difference], ref: str, module: str) -> list[Difference]:
    return [d for d in several if (d.ref, d.module) == (ref, module)]


def _common(views: Sequence[View]) -> list[str]:
    """Columns that the first run and another one recorded, in the order in which a step reaches them."""
    others = set().union(*(v.refs for v in views[1:]))
    known = load_metrics()
    columns = {f"{m.id}.{c.name}" for m in known.values() for c in m.columns}
    both = [
        r
        for r in views[0].refs
        if r in columns & others and set(views[0].modules(r)) & set().union(*(v.modules(r) for v in views[1:]))
    ]
    return sorted(both, key=lambda r: SITES.index(known[r.partition(".")[0]].site))


def _sweep(found: Comparison) -> None:
    """What a sweep says of learning rates and sizes; nothing, if the runs are none."""
    if found.sensitivity:
        curves = {f"{s.parameters:,} parameters": (s.rates, s.losses) for s in found.sensitivity}
        said = " · ".join(
            f"{f'{s.parameters:,} parameters: ' if len(curves) > 1 else ''}"
            f"{number(s.value)} in units of the loss, best learning rate {s.best:g}"
            for s in found.sensitivity
        )
        st.html(markup.heading("Learning-rate sensitivity") + markup.line(said))
        figure = figures.sweep(curves, "Final loss at each peak learning rate", theme.palette())
        st.plotly_chart(figure, key=Key.SWEEP, theme=None, config=figures.CONFIG)
    for e in found.extrapolation:
        st.html(markup.extrapolation(e))


PAGE = Page("Compare", 10, page)
