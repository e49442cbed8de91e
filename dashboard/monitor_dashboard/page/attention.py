"""Attention: one number for every head of every layer at one step, and all that was recorded of the head chosen."""

from __future__ import annotations

import re

import numpy as np
import streamlit as st

from monitor.diagnosis.incident import together
from monitor.diagnosis.report import describe
from monitor.diagnosis.text import when
from monitor.metric import Block, load_metrics
from monitor.rule import load_rules
from monitor_dashboard import choose, figures, markup, panels, theme, window
from monitor_dashboard.data import View
from monitor_dashboard.figures import Heads
from monitor_dashboard.keys import Key
from monitor_dashboard.page import Page
from monitor_dashboard.sampling import INF, MISSING, NAN, VALUE

#: What the map can show, by name: column, and whether colours are spread over the logarithm.
SHOWN = {
    "largest logit": ("attn_logit_max.found", True),
    "bound of the logit": ("attn_logit_max.lse_max", True),
    "entropy": ("attn_entropy.normalised", False),
    "first key": ("attn_sink_mass.mass", False),
    "alignment": ("qk_norm_bound.alignment", False),
}
#: Steps before the one asked for in which a value is looked for: it is recorded every tenth.
BACK = 200
_HEAD = re.compile(r"(.*)\[(\d+)\]\Z")


def page(view: View) -> None:
    """Draw the attention of one run."""
    options = [name for name, (ref, _) in SHOWN.items() if view.modules(ref)]
    if not options:
        st.html(markup.line("No attention was recorded in this run."))
        return
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        st.html(markup.heading("Heads"), width="content")
        chosen = choose.one_of(Key.HEAD_METRIC, options, options[0], 190)
        st.html(markup.heading("at step"), width="content")
        wish = st.number_input(
            Key.HEAD_STEP, min_value=0, value=None, step=1, placeholder="latest", key=Key.HEAD_STEP,
            bind="query-params", width=104, label_visibility="collapsed",
        )  # fmt: skip
        ref, log = SHOWN[chosen]
        block = view.before(ref, view.span[1] if wish is None else wish, BACK)
        heads, step = latest(block, ref)
        known = [f"{layer}[{h}]" for layer, row in zip(heads.layers, heads.state, strict=True)
                 for h in np.flatnonzero(row != MISSING)]  # fmt: skip
        if not known:
            st.html(markup.line(f"nothing was recorded in the {BACK} steps before"), width="content")
            return
        named = (f.module for i in view.verdict.incidents for f in i.findings if f.module in known)
        module = choose.one_of(Key.HEAD, known, next(named, ""), 330)
        st.html(markup.line(f"recorded at step {step:,} · click a head for its series"), width="content")
    figure, points = figures.head_map(heads, chosen, module, theme.palette(), log=log)
    st.plotly_chart(
        figure, key=Key.HEAD_MAP, theme=None, config=figures.CONFIG, on_select=lambda: _clicked(points),
        selection_mode="points",
    )  # fmt: skip
    _findings(view)
    _series(view, module)


def latest(block: Block, ref: str) -> tuple[Heads, int]:
    """The last value of each head in ``block``, layers × heads, and the last step of one; -1 if there is none."""
    values, has = block[ref], block.has(ref)
    cells: dict[str, dict[int, float]] = {}
    step = -1
    for i, module in enumerate(block.modules):
        found = _HEAD.match(module)
        rows = np.flatnonzero(has[:, i])
        if found and len(rows):
            cells.setdefault(found[1], {})[int(found[2])] = float(values[rows[-1], i])
            step = max(step, int(block.steps[rows[-1]]))
    shape = len(cells), 1 + max((h for row in cells.values() for h in row), default=-1)
    grid, state = np.full(shape, np.nan), np.full(shape, MISSING, dtype=np.int8)
    for i, row in enumerate(cells.values()):
        for h, value in row.items():
            grid[i, h] = value
            state[i, h] = VALUE if np.isfinite(value) else NAN if np.isnan(value) else INF
    return Heads(tuple(cells), grid, state), step


def _clicked(points: list[str]) -> None:
    chosen = st.session_state[Key.HEAD_MAP].selection.points
    if chosen and chosen[0]["curve_number"] == 2:
        st.session_state[Key.HEAD] = points[chosen[0]["point_index"]]


def _findings(view: View) -> None:
    """What the rules of attention found: of each rule the first, and how many more."""
    rules = load_rules()
    found = [f for i in view.verdict.incidents for f in i.findings if f.site == "attention"]
    st.html(markup.heading(f"Findings of attention · {len(found)}" if found else "Findings of attention"))
    if not found:
        st.html(markup.line("None."))
        return
    told = []
    for finding, others in together(found):
        rule = rules.get(finding.rule)
        more = f" And {others:,} more of this kind." if others else ""
        told.append((finding.title, f"{when(finding, rule)}: {describe(finding, rule)}{more}"))
    st.html(markup.table(told, words=True))


def _series(view: View, module: str) -> None:
    """Every series of one head, with its own findings."""
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        st.html(markup.heading_of(module), width="content")
        steps = window.fields(view.span)
    strips = []
    for name, (ref, log) in SHOWN.items():
        metric, _, column = ref.partition(".")
        told = load_metrics()[metric].column(column).doc
        strips.append(panels.strip(view, [ref], steps, title=name, caption=told, log=log, only=(module,)))
    pins = panels.pins(view, steps, module, numbered=False)
    window.chart(figures.lines([s for s in strips if s], pins, steps, theme.palette()), Key.HEAD_LINES)


PAGE = Page("Attention", 20, page)
