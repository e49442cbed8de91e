"""Curvature: sharpness against what the optimizer is stable for, the spectrum over time, the trace, the blocks."""

from __future__ import annotations

import contextlib

import numpy as np
import pyarrow as pa
import streamlit as st

from monitor.errors import MonitorError
from monitor_dashboard import data, figures, markup, panels, theme, window
from monitor_dashboard.data import View
from monitor_dashboard.figures import Panel, Spectra
from monitor_dashboard.keys import Key
from monitor_dashboard.page import Page
from monitor_dashboard.sampling import Line

#: Strips from the top: title, caption, and the columns in each with their names.
STRIPS = (
    ("sharpness", "Largest Hessian eigenvalue of the batch", (("sharpness.value", "sharpness"),)),
    ("preconditioned", "Sharpness as the adaptive optimizer meets it",
     (("preconditioned_sharpness.value", "sharpness"), ("preconditioned_sharpness.threshold", "threshold"))),
    ("edge_of_stability", "Step size against curvature: 1 is the edge", (("edge_of_stability.ratio", "ratio"),)),
    ("learning rate", "Used, and the largest stable for the batch",
     (("edge_of_stability.stable_lr", "stable"), ("learning_rate.lr", "used"))),
    ("batch_sharpness", "Curvature along the batch's own gradient", (("batch_sharpness.value", "value"),)),
    ("hessian_eigenvalue", "Largest eigenvalues", (("hessian_eigenvalue.value", ""),)),
)  # fmt: skip
#: The threshold of SGD stands beside the sharpness; that of an adaptive optimizer beside the preconditioned one.
THRESHOLD = ("edge_of_stability.threshold", "threshold")
#: Spectra drawn at once, evenly chosen of those there are.
MOST = 80
NOTHING = 'Curvature was not recorded: monitor.attach(model, curvature="auto") measures it.'


def page(view: View) -> None:
    """Draw the curvature of one run."""
    if not {"sharpness", "batch_sharpness"} & view.metrics.keys():
        why = next((str(a["why"]) for a in view.run.info["absent"] if a["what"] == "curvature"), None)
        st.html(markup.line(NOTHING if why is None else f"Curvature was not recorded: {why}"))
        return
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        steps = window.fields(view.span)
        st.html(markup.line(_headline(view)))
    strips = [_strip(view, steps, title, caption, columns) for title, caption, columns in STRIPS]
    if "hessian_trace" in view.metrics:
        strips.append(_trace(view, steps))
    window.chart(figures.lines([s for s in strips if s], [], steps, theme.palette()), Key.CURVATURE)
    found = _spectra(view)
    if found is not None:
        caption = "Eigenvalues of the Hessian: a colour for the share of them in a cell"
        st.plotly_chart(
            figures.spectra(found, caption, "loss/weight²", steps, theme.palette()), key=Key.SPECTRUM, theme=None,
            config=figures.CONFIG,
        )  # fmt: skip
    _landscape(view)
    if "block_sharpness" in view.metrics:
        metric = view.metrics["block_sharpness"]
        grid = view.grid(data.main_column(metric), *steps)
        figure, _ = figures.heat_map(grid, metric.title, "", steps, theme.palette(), log=True)
        st.plotly_chart(figure, key=Key.BLOCKS, theme=None, config=figures.CONFIG)
    if "opposing_signals" in view.metrics:
        st.html(markup.line(_opposing(view)))


def _headline(view: View) -> str:
    """What was measured last, and on what."""
    words = []
    for ref, text in (
        ("sharpness.value", "sharpness {:.4g}"),
        ("edge_of_stability.ratio", "{:.3g} of the edge of stability"),
        ("edge_of_stability.stable_lr", "stable up to a learning rate of {:.3g}"),
        ("sharpness.examples", "measured on batches of {:,.0f}"),
    ):
        found = view.last(ref)
        if found is not None:
            words.append(("" if words else f"step {found[0]:,}: ") + text.format(found[1]))
    return " · ".join(words)


def _strip(
    view: View, steps: tuple[int, int], title: str, caption: str, columns: tuple[tuple[str, str], ...]
) -> Panel | None:
    drawn: dict[str, Line] = {}
    if not view.modules(columns[0][0]):
        return None
    if title == "sharpness" and "preconditioned_sharpness" not in view.metrics:
        columns = (*columns, THRESHOLD)
    log = title not in ("hessian_eigenvalue", "batch_sharpness")  # which may be negative
    for ref, name in columns:
        modules = view.modules(ref)[: panels.MAX_LINES]
        for module in modules:
            label = name if len(modules) == 1 else module.removeprefix("eigenvalue") if not name else f"{name} {module}"
            drawn[label] = view.line(ref, module, *steps, log)
    return Panel(title, caption, data.unit(columns[0][0]), drawn, log, 150 if title == "sharpness" else 100)


def _trace(view: View, steps: tuple[int, int]) -> Panel | None:
    caption = "Sum of the eigenvalues, its error, root of the sum of their squares"
    refs = [f"hessian_trace.{c}" for c in ("trace", "stderr", "frobenius")]
    return panels.strip(view, refs, steps, title="hessian_trace", caption=caption, height=100)


def _spectra(view: View) -> Spectra | None:
    """The stored densities, those of a later attempt in place of an earlier one's of the same step."""
    known = {step: attempt for name, attempt, step in view.run.tables() if name == "spectral_density"}
    steps = sorted(known)
    if len(steps) > MOST:
        steps = [steps[i] for i in np.linspace(0, len(steps) - 1, MOST).astype(int)]
    at, nodes, weights = [], [], []
    for step in steps:
        with contextlib.suppress(MonitorError, KeyError, pa.ArrowInvalid):  # a damaged or foreign one is left out
            table = view.run.table("spectral_density", step, known[step])
            x, w = (table.column(c).to_numpy().astype(np.float64) for c in ("node", "weight"))
            good = np.isfinite(x) & np.isfinite(w)
            at.append(np.full(int(good.sum()), float(step)))
            nodes.append(x[good])
            weights.append(w[good])
    if not any(len(x) for x in nodes):
        return None
    return Spectra(np.concatenate(at), np.concatenate(nodes), np.concatenate(weights))


def _landscape(view: View) -> None:
    """Draw the loss around the weights as it was stored last, if it was."""
    known = [(attempt, step) for name, attempt, step in view.run.tables() if name == "landscape"]
    if not known:
        return
    attempt, step = max(known)
    with contextlib.suppress(
        MonitorError, KeyError, ValueError, pa.ArrowInvalid
    ):  # a damaged or foreign one is left out
        table = view.run.table("landscape", step, attempt)
        x, y, loss = (table.column(c).to_numpy().astype(np.float64) for c in ("first", "second", "loss"))
        (first, row), (second, column) = np.unique(x, return_inverse=True), np.unique(y, return_inverse=True)
        values = np.full((len(first), len(second)), np.nan)
        values[row, column] = loss
        if np.isfinite(values).any() and min(values.shape) > 1 and np.isfinite([*first, *second]).all():
            caption = f"Loss at step {step:,} along the two sharpest directions of the Hessian, by distance ‖Δw‖"
            figure = figures.landscape(first, second, values, caption, theme.palette())
            st.plotly_chart(figure, key=Key.LANDSCAPE, theme=None, config=figures.CONFIG)


def _opposing(view: View) -> str:
    values = {c: view.last(f"opposing_signals.{c}") for c in ("rows", "up", "up_mean", "down", "down_mean", "typical")}
    if any(v is None for v in values.values()):
        return ""
    step = max(v[0] for v in values.values() if v)
    rows, up, up_mean, down, down_mean, typical = (v[1] for v in values.values() if v)
    return (
        f"Along the sharpest direction at step {step:,}, half of the pull up comes from {up:.0f} of {rows:,.0f} rows "
        f"({up_mean:.3g} each), half of the pull down from {down:.0f} ({down_mean:.3g} each); typical is {typical:.3g}."
    )


PAGE = Page("Curvature", 50, page)
