"""Routing: the loads of one router's experts, how it chooses, and the pathways of samples beside their control."""

from __future__ import annotations

import re
from collections.abc import Sequence

import streamlit as st

from monitor_dashboard import choose, figures, markup, panels, theme, window
from monitor_dashboard.data import View
from monitor_dashboard.figures import Panel
from monitor_dashboard.keys import Key
from monitor_dashboard.page import Page

LOAD = "router_load.load"
#: Strips: title, caption, metric, its columns, logarithmic.
Strip = tuple[str, str, str, tuple[str, ...], bool]
BALANCE: tuple[Strip, ...] = (
    ("experts in use", "Exponential of the entropy of the loads", "router_balance", ("effective",), False),
    (
        "unevenness",
        "Of the loads: deviation over mean; largest over fair, less 1",
        "router_balance",
        ("cv", "max_violation"),
        False,
    ),
    (
        "beyond capacity",
        "Dropped, or would be at a factor of 1.25",
        "router_balance",
        ("dropped", "over_capacity"),
        False,
    ),
    (
        "margin",
        "Between the two largest scores; information in a choice",
        "router_balance",
        ("margin", "mutual_information"),
        False,
    ),
    ("expert similarity", "Cosine of the weights of two experts", "expert_similarity", ("mean", "largest"), False),
)
PATHWAYS: tuple[Strip, ...] = (
    ("pathway smoothness", "From one layer to the next", "pathway_consistency", ("mean_cosine", "consistency"), False),
    (
        "pathway distance",
        "Edits between two samples",
        "pathway_distance",
        ("distance", "half_distance", "chosen_distance"),
        False,
    ),
    ("pathway churn", "Choices changed since the last look", "pathway_churn", ("churn",), False),
    ("routing dimension", "In which samples are told apart", "routing_dimension", ("dimension",), False),
)
CONTROL: tuple[Strip, ...] = (
    ("control: z-loss", "Mean squared log-sum-exp of the scores", "router_balance", ("z",), True),
    (
        "control: entropy",
        "Of a token's probabilities, and of their mean",
        "router_balance",
        ("normalised", "mean_normalised"),
        False,
    ),
)
READING = (
    "Pathways describe routing and show no generalisation by themselves: on labels that cannot be learned they move "
    "the same way. What moves together with the control, the z-loss and the entropy of the routers, is due to the "
    "terms on the routers."
)
_EXPERT = re.compile(r"(.*)\[(\d+)\]\Z")


def page(view: View) -> None:
    """Draw the routing of one run."""
    routers = view.modules("router_balance.cv")
    if not routers:
        st.html(markup.line("No router of experts was seen in this run."))
        return
    named = (f.module for i in view.verdict.incidents for f in i.findings if f.module in routers)
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        st.html(markup.heading("Router"), width="content")
        router = choose.one_of(Key.ROUTER, routers, next(named, ""), 330)
        steps = window.fields(view.span)
        st.html(markup.line(_sizes(view, router)), width="content")
    _loads(view, router, steps)
    _chart(view, router, _panels(view, router, BALANCE, steps), steps, Key.BALANCE)
    st.html(markup.heading("Pathways beside their control"))
    pathways = _panels(view, router, PATHWAYS, steps)
    if not pathways:
        st.html(markup.line("No pathways were measured: they are looked at now and then after the first ten steps."))
        return
    st.html(markup.line(READING))
    _chart(view, router, [*pathways, *_panels(view, router, CONTROL, steps)], steps, Key.PATHWAYS)


def _sizes(view: View, router: str) -> str:
    last = [view.line(f"router_balance.{c}", router, *view.span, False).last for c in ("experts", "top_k", "tokens")]
    experts, k, tokens = last
    return f"{experts:,.0f} experts, {k:,.0f} for each token, {tokens:,.0f} tokens a step"


def _loads(view: View, router: str, steps: tuple[int, int]) -> None:
    """Experts × steps of the router's loads."""
    found = {m: int(e[2]) for m in view.modules(LOAD) if (e := _EXPERT.match(m)) and e[1] == router}
    if not found:
        st.html(markup.line("The loads of its experts were not recorded: there are too many."))
        return
    experts = tuple(sorted(found, key=lambda m: found[m]))
    grid = view.grid(LOAD, *steps, experts)
    if grid.hidden:
        st.html(markup.line(f"{len(grid.modules)} of {len(experts):,} experts: those with the largest loads"))
    figure, _ = figures.heat_map(grid, "Share of the assignments", "", steps, theme.palette(), log=False)
    st.plotly_chart(figure, key=Key.LOADS, theme=None, config=figures.CONFIG)


def _panels(view: View, router: str, strips: Sequence[Strip], steps: tuple[int, int]) -> list[Panel]:
    """The strips that were recorded, of the router or of the whole run."""
    found = []
    for title, caption, metric, columns, log in strips:
        refs = [f"{metric}.{column}" for column in columns]
        found.append(panels.strip(view, refs, steps, title=title, caption=caption, log=log, only=(router, "")))
    return [strip for strip in found if strip]


def _chart(view: View, router: str, strips: Sequence[Panel], steps: tuple[int, int], key: Key) -> None:
    pins = panels.pins(view, steps, router, numbered=False)
    window.chart(figures.lines(strips, pins, steps, theme.palette()), key)


PAGE = Page("Routing", 30, page)
