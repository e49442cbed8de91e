"""Two small groups of rows pull against each other, and they alone decide how large a step may be.

What it means:
    Along the sharpest direction of the loss a handful of rows wants to go one way and another handful the other way,
    each many times harder than a typical row, and nearly nothing is left of the sum. The learning rate is as large as
    this direction allows: it is limited by these rows, not by the bulk of the data. Late in training that is common
    (the last rows to be fitted); where it is the same kind of row for long, it is worth a look.

How it is decided:
    In 3 full measurements in a row each group of `opposing_signals` is at most 2 % of 100 rows or more, both pull at
    least 10 times as hard as the typical row, 90 % or more of the pull cancels, and `edge_of_stability` is 0.9 or
    above. Small groups alone say little: whatever has been fitted pulls no more, and few rows are left.

What to do:
    Look at the rows: the table `opposing_signals` of the step has their places in the batch, their projections and
    losses, and what was passed to `handle.note()` for that step tells which examples these are. Ambiguous or wrong
    labels and shared artefacts (a logo, a border, a prefix) are the usual finds.

When it is wrong:
    Rows of a few hard but sound examples look the same. Batches of less than 100 rows are not judged, nor losses that
    are not made of cross-entropy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._curvature import at

RATIO = "edge_of_stability.ratio"
COLUMNS = ("rows", "up", "down", "up_mean", "down_mean", "typical", "cancelled")
CALIBRATION = (
    "calibrated on 26 small trainings: two planted groups of ten among 1,000 met it at a large step from when they "
    "reached the edge on; the same data without them, or with a small step, did not"
)


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Measurements at the edge whose sharpest direction belongs to two small groups."""
    steps = window["opposing_signals.rows"].steps
    read = {name: at(window, f"opposing_signals.{name}", steps) for name in COLUMNS}
    rows, up, down, up_mean, down_mean, typical, cancelled = (read[name][0] for name in COLUMNS)
    ratio, known = at(window, RATIO, steps)
    has = known & np.logical_and.reduce([read[name][1] for name in COLUMNS])
    with np.errstate(divide="ignore", invalid="ignore"):
        times = np.minimum(up_mean, -down_mean) / typical
    has = has & ~np.isnan(times)
    small = (rows >= p["rows"]) & (np.maximum(up, down) <= p["group"] * rows)
    mask = has & small & (times >= p["times"]) & (cancelled >= p["cancelled"]) & (ratio >= p["ratio"])
    evidence = {"up": up, "down": down, "rows": rows, "cancelled": cancelled, "ratio": ratio}
    yield Hits(steps, ("",), mask, has, times, p["times"], evidence)


RULE = Rule(
    id="opposing_groups",
    title="Opposing groups of rows at the edge of stability",
    severity="info",
    site="loss",
    message="{up:.0f} and {down:.0f} of {rows:.0f} rows pull against each other {value:.3g} times as hard as a typical "
    "row; they set the limit of the learning rate.",
    refute="without these rows the sharpness is the same",
    remedies=(
        Remedy("look at the rows in the table opposing_signals of this step; handle.note() tells which examples"),
        Remedy("repair or drop those with wrong labels or shared artefacts"),
    ),
    params=(
        Param("rows", 100, "rows", "own choice: 2 % of them are two"),
        Param("group", 0.02, "of the rows", f"{CALIBRATION} (0.004 to 0.02)"),
        Param("times", 10, "times the typical row", f"{CALIBRATION} (50 and more; at the start 1 to 6)"),
        Param("cancelled", 0.9, "of the pull", f"{CALIBRATION} (1.00)"),
        Param("ratio", 0.9, "of the edge", f"{CALIBRATION} (0.93 to 1.09 with them, at most 0.85 without)"),
    ),
    needs=(RATIO, *(f"opposing_signals.{name}" for name in COLUMNS)),
    check=check,
    hold=3,
    release=3,
    doc=__doc__ or "",
)
