"""From memorising to generalising: the phases of the run on one time line, over all that tells them apart."""

from __future__ import annotations

import math
from typing import Literal

import streamlit as st

from monitor.diagnosis.phases import Phases
from monitor.diagnosis.text import number
from monitor.diagnosis.transition import CAVEAT, Transition, told
from monitor.rules._series import logged_as
from monitor_dashboard import figures, markup, panels, theme, window
from monitor_dashboard.data import View
from monitor_dashboard.figures import Band, Panel
from monitor_dashboard.keys import Key
from monitor_dashboard.page import Page

#: What moves before the held-out accuracy does, or says why it does not: metric, its columns.
MARKERS = (
    ("restricted_loss", ("restricted", "excluded", "test")),
    ("gini", ("gini",)),
    ("odd_fraction", ("omega",)),
    ("local_complexity", ("cut",)),
    ("zscore_target", ("mean",)),
    ("nlm_rate", ("rate",)),
    ("nlm_cos", ("total", "cos")),
    ("sc_headroom", ("q50",)),
    ("param_norm", ("norm",)),
    ("distance_from_start", ("distance",)),
)
#: Of these alone, which every training has, nothing can be told.
GENERAL = {"sc_headroom", "param_norm", "distance_from_start"}
_OUTCOMES: tuple[tuple[Literal["accuracy", "loss"], str, str], ...] = (
    ("accuracy", "train_accuracy.accuracy", "Share of right answers"),
    ("loss", "loss.value", "Loss"),
)
WORDS = {
    "normal": "Held-out data followed without a delay",
    "delayed": "Generalisation came late",
    "grokking": "Grokking",
    "memorised": "Memorised, not generalised",
    "undecided": "Neither memorised nor generalised yet",
}
NOTHING = (
    "Nothing to tell memorising from generalising by: log a held-out accuracy or loss, "
    "handle.log(val_acc=…), or attach a probe of monitor.probes."
)


def page(view: View) -> None:
    """Draw the way from memorising to generalising of one run."""
    found = view.phases
    if found is None and not any(name in view.metrics for name, _ in MARKERS if name not in GENERAL):
        st.html(markup.line(NOTHING))
        return
    st.html(_headline(found) if found else _hint(view.transition))
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        steps = window.fields(view.span)
        log = st.toggle("log steps", value=False, key=Key.LOG_STEPS, bind="query-params", width="content")
    strips = [*_outcome(view, steps), *_markers(view, steps)]
    bands = [Band(p.name, p.first, p.last) for p in found.timeline] if found else []
    window.chart(figures.lines(strips, [], steps, theme.palette(), bands=bands, log_steps=log), Key.PHASES)
    missing = [name for name, _ in MARKERS if name not in view.metrics]
    if missing:
        st.html(markup.line(f"Not recorded: {', '.join(missing)}"))


def _hint(found: Transition | None) -> str:
    """What is said where no held-out data are known."""
    unknown = markup.line("No held-out accuracy or loss was logged, so the phases are not known.")
    if found is None:
        return unknown
    votes = ", ".join(f"{v.ref.partition('.')[0]} {'for' if v.agrees else 'against'}" for v in found.votes)
    lines = [told(found) or CAVEAT, found.why, f"at the last evaluation: {votes}" if votes else ""]
    return unknown + "".join(markup.line(text[0].upper() + text[1:]) for text in lines if text)


def _headline(found: Phases) -> str:
    def at(step: int | None) -> str:
        return "not yet" if step is None else f"at step {step:,}"

    words = [f"memorised {at(found.memorised)}", f"generalised {at(found.generalised)}"]
    if found.ratio is not None:
        words.append(f"{number(round(found.ratio, 1))} times as late")
    words += [f"last gap {number(found.gap)}", f"{found.train} against {found.test}"]
    return markup.heading(WORDS[found.label]) + markup.line(" · ".join(words))


def _outcome(view: View, steps: tuple[int, int]) -> list[Panel]:
    """Accuracies together and losses together, of the training and of the held-out data."""
    logged = view.modules("logged.value")
    strips = []
    for quantity, ref, caption in _OUTCOMES:
        names = [*logged_as(logged, quantity, train=True), *logged_as(logged, quantity)][: panels.MAX_LINES]
        log, own = quantity == "loss", view.modules(ref)[: panels.MAX_LINES]
        drawn = {"training" if len(own) == 1 else m: view.line(ref, m, *steps, log) for m in own}
        drawn |= {name: view.line("logged.value", name, *steps, log) for name in names}
        if drawn:
            strips.append(Panel(quantity, caption, "", drawn, log, 150))
    return strips


def _markers(view: View, steps: tuple[int, int]) -> list[Panel]:
    strips = []
    for name, columns in MARKERS:
        metric = view.metrics.get(name)
        if metric is not None:
            refs = [f"{name}.{column}" for column in columns]
            caption = _growth(view, metric.title) if name == "distance_from_start" else metric.title
            log = metric.plot.log or name == "nlm_rate"
            strips.append(panels.strip(view, refs, steps, title=name, caption=caption, log=log))
    return [strip for strip in strips if strip]


def _growth(view: View, caption: str) -> str:
    """The caption with the growth of the whole per factor of e in steps: that of a random walk has an R² near 1."""
    fit = view.log_distance
    if fit is None or not math.isfinite(fit.r2):
        return caption
    return f"{caption}: {number(round(fit.slope, 2))} · ln t, R² {fit.r2:.2f}"


PAGE = Page("Grokking", 40, page)
