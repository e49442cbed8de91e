"""Series: every column that was recorded or can be computed, of whichever modules, and the stored tables."""

from __future__ import annotations

import math
from typing import Any

import streamlit as st

from monitor.diagnosis.text import plain
from monitor.errors import MonitorError
from monitor.metric import SITES, load_metrics
from monitor_dashboard import choose, data, figures, markup, panels, theme, window
from monitor_dashboard.data import View
from monitor_dashboard.keys import Key
from monitor_dashboard.page import Page

#: Rows of a table that are shown.
MOST = 1_000


def page(view: View) -> None:
    """Draw any series of one run."""
    columns = _columns(view)
    if not columns:
        st.html(markup.line("No series was recorded."))
        return
    known = load_metrics()
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        steps = window.fields(view.span)
        name = choose.one_of(Key.WHICH, list(columns), "loss", 330)
        part = st.text_input(
            Key.FILTER, key=Key.FILTER, bind="query-params", label_visibility="collapsed", width=220,
            placeholder="modules that contain …",
        )  # fmt: skip
        st.html(markup.line(_note(name)), width="content")
    every = list(dict.fromkeys(m for column in columns[name] for m in view.modules(f"{name}.{column}")))
    # what belongs to the whole run stays, whatever is looked for
    chosen = [m for m in every if not m or part.strip().lower() in plain(m).lower()]
    strips = [_strip(view, name, column, steps, chosen) for column in columns[name]]
    drawn = [strip for strip in strips if strip]
    if not drawn:
        st.html(
            markup.line(f"No module of {name} has {part.strip()!r} in its name; it was recorded for {len(every):,}.")
        )
    else:
        window.chart(figures.lines(drawn, [], steps, theme.palette()), Key.ALL)
    if name in known:
        _map(view, name, steps, chosen)
    _table(view)


def _columns(view: View) -> dict[str, list[str]]:
    """Metric -> its columns with a series, in the order in which a step reaches them, unknown ones last."""
    known = load_metrics()
    found: dict[str, list[str]] = {}
    for ref in view.refs:
        metric, _, column = ref.partition(".")
        if view.modules(ref):
            found.setdefault(metric, []).append(column)
    sites = {name: SITES.index(m.site) for name, m in known.items()}
    return dict(sorted(found.items(), key=lambda item: (sites.get(item[0], len(SITES)), item[0])))


def _note(name: str) -> str:
    metric = load_metrics().get(name)
    return f"{metric.title} · monitor explain {name} says more" if metric else "not known to this version"


def _strip(view: View, name: str, column: str, steps: tuple[int, int], chosen: list[str]) -> figures.Panel | None:
    metric = load_metrics().get(name)
    told = next((c for c in metric.columns if c.name == column), None) if metric else None
    log = metric is not None and metric.plot.log and metric.plot.column == column
    return panels.strip(
        view, [f"{name}.{column}"], steps, title=column, caption=told.doc if told else "", log=log, only=chosen
    )


def _map(view: View, name: str, steps: tuple[int, int], chosen: list[str]) -> None:
    """Modules × steps, where there are more than have a line of their own."""
    metric = load_metrics()[name]
    ref = data.main_column(metric)
    wished = frozenset(chosen)
    modules = tuple(m for m in view.modules(ref) if m in wished)
    if len(modules) <= panels.MAX_LINES:
        return
    grid = view.grid(ref, *steps, modules)
    hidden = f"{len(grid.modules)} of {len(modules):,} rows: those with the largest values" if grid.hidden else ""
    st.html(markup.heading("All of these modules") + (markup.line(hidden) if hidden else ""))
    caption = f"{metric.plot.column}: {metric.title}"
    figure, _ = figures.heat_map(grid, caption, "", steps, theme.palette(), log=metric.plot.log)
    st.plotly_chart(figure, key=Key.ALL_MAP, theme=None, config=figures.CONFIG)


def _table(view: View) -> None:
    """One of the tables that were stored beside the series, as it is."""
    tables = {f"{name} at step {step:,}" + (f", attempt {attempt}" if attempt else ""): (name, step, attempt)
              for name, attempt, step in reversed(view.run.tables())}  # fmt: skip
    if not tables:
        return
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        st.html(markup.heading("Stored tables"), width="content")
        wanted = st.selectbox(
            Key.TABLE, list(tables), index=None, key=Key.TABLE, bind="query-params", label_visibility="collapsed",
            width=330, format_func=markup.name, placeholder=f"{len(tables):,} of them",
        )  # fmt: skip
    if wanted is None:
        return
    try:
        table = view.run.table(*tables[wanted])
    except MonitorError as e:
        st.html(markup.line(str(e)))
        return
    shown = {plain(k, 60): _cells(v) for k, v in table.slice(0, MOST).to_pydict().items()}
    digits = {k: st.column_config.NumberColumn(format="%.6g") for k, v in shown.items() if _numeric(v)}
    st.dataframe(shown, hide_index=True, width=720, column_config=digits)
    if table.num_rows > MOST:
        st.html(markup.line(f"the first {MOST:,} of {table.num_rows:,} rows"))


def _numeric(values: list[Any]) -> bool:
    return any(isinstance(v, float) for v in values)


def _cells(values: list[Any]) -> list[Any]:
    """A column as it is shown: text is anybody's and stays text; NaN and infinities would be empty among numbers."""
    if any(isinstance(v, float) and not math.isfinite(v) for v in values):
        return [f"{v:.6g}" if isinstance(v, float) else v for v in values]
    return [plain(v, 200) if isinstance(v, str) else v for v in values]


PAGE = Page("Series", 60, page)
