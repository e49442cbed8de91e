"""From memorising to generalising: the phases of the run on one time line, over all that tells them apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import streamlit as st

from monitor.diagnosis.phases import Phases
from monitor.diagnosis.text import number
from monitor.metric import Metric
from monitor.rules._series import logged_as
from monitor_dashboard import data, figures, markup, theme
from monitor_dashboard.data import View
from monitor_dashboard.figures import Band, Panel
from monitor_dashboard.keys import Key
from monitor_dashboard.page import Page
from monitor_dashboard.sampling import Line

#: Lines in one strip; the rest are counted.
MAX_LINES = 6
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
    window = view.span
    found = view.phases
    panels = [*_outcome(view, window), *_markers(view, window)] if view.run.steps else []
    if found is None and not any(name in view.metrics for name, _ in MARKERS if name not in GENERAL):
        st.html(markup.line(NOTHING))
        return
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        st.html(_headline(found), width="stretch")
        log = st.toggle("log steps", value=False, key=Key.LOG_STEPS, bind="query-params", width="content")
    bands = [Band(p.name, p.first, p.last) for p in found.timeline] if found else []
    st.plotly_chart(
        figures.phases(panels, bands, window, theme.palette(), log_steps=log), key=Key.PHASES, theme=None,
        config=figures.CONFIG,
    )  # fmt: skip
    missing = [name for name, _ in MARKERS if name not in view.metrics]
    if missing:
        st.html(markup.line(f"Not recorded: {', '.join(missing)}"))


def _headline(found: Phases | None) -> str:
    if found is None:
        return markup.line("No held-out accuracy or loss was logged, so the phases are not known.")

    def at(step: int | None) -> str:
        return "not yet" if step is None else f"at step {step:,}"

    words = [f"memorised {at(found.memorised)}", f"generalised {at(found.generalised)}"]
    if found.ratio is not None:
        words.append(f"{number(round(found.ratio, 1))} times as late")
    words += [f"last gap {number(found.gap)}", f"{found.train} against {found.test}"]
    return markup.heading(WORDS[found.label]) + markup.line(" · ".join(words))


def _outcome(view: View, window: tuple[int, int]) -> list[Panel]:
    """Accuracies together and losses together, of the training and of the held-out data."""
    logged = view.modules("logged.value")
    panels = []
    for quantity, ref, caption in _OUTCOMES:
        names = [*logged_as(logged, quantity, train=True), *logged_as(logged, quantity)]
        log, own = quantity == "loss", view.modules(ref)
        drawn = {"training" if len(own) == 1 else m: view.line(ref, m, *window, log) for m in own}
        drawn |= {name: view.line("logged.value", name, *window, log) for name in names}
        if drawn:
            panels.append(_strip(quantity, caption, "", drawn, log=log, height=150))
    return panels


def _markers(view: View, window: tuple[int, int]) -> list[Panel]:
    panels = []
    for name, columns in MARKERS:
        metric = view.metrics.get(name)
        if metric is not None:
            log = metric.plot.log or name == "nlm_rate"
            caption = _growth(view, metric.title) if name == "distance_from_start" else metric.title
            drawn = _lines(view, metric, columns, window, log=log)
            panels.append(_strip(name, caption, data.unit(metric), drawn, log=log))
    return panels


def _growth(view: View, caption: str) -> str:
    """The caption with the growth of the whole per factor of e in steps: that of a random walk has an R² near 1."""
    fit = view.log_distance
    if fit is None or not math.isfinite(fit.r2):
        return caption
    return f"{caption}: {number(round(fit.slope, 2))} · ln t, R² {fit.r2:.2f}"


def _lines(
    view: View, metric: Metric, columns: Sequence[str], window: tuple[int, int], *, log: bool
) -> dict[str, Line]:
    drawn: dict[str, Line] = {}
    for column in columns:
        ref = f"{metric.id}.{column}"
        modules = view.modules(ref)
        for module in modules:
            drawn[column if len(modules) == 1 else module] = view.line(ref, module, *window, log)
    return drawn


def _strip(title: str, caption: str, unit: str, drawn: dict[str, Line], *, log: bool, height: int = 84) -> Panel:
    if len(drawn) > MAX_LINES:
        caption = f"{caption} ({MAX_LINES} of {len(drawn)})"
    shown = dict(list(drawn.items())[:MAX_LINES])
    return Panel(title, caption, unit, shown, log, max(height, 60 + 15 * len(shown)))


PAGE = Page("Grokking", 40, page)
