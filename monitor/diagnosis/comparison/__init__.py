"""Several runs side by side, the first being what the others are compared with.

`table` says what is known of each, `settings` what differs between them before the first step, `overlay` where two part
(with the bands of `noise`), `sweep` what they say together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from monitor.diagnosis.comparison.noise import BLOCK, HOLD, band, departures
from monitor.diagnosis.comparison.overlay import (
    CALIBRATION,
    Departure,
    Difference,
    Parting,
    apart,
    first_of_each,
    noise_band,
    parting,
    same,
    stays,
)
from monitor.diagnosis.comparison.settings import differs
from monitor.diagnosis.comparison.sweep import (
    LOGIT_LIMIT,
    Extrapolation,
    Sensitivity,
    extrapolate,
    extrapolations,
    sensitivities,
    sensitivity,
)
from monitor.diagnosis.comparison.table import Row, logged_in, names, row

if TYPE_CHECKING:
    from monitor.store.run import Run

__all__ = [
    "BLOCK",
    "CALIBRATION",
    "HOLD",
    "LOGIT_LIMIT",
    "PAIRS",
    "Comparison",
    "Departure",
    "Difference",
    "Extrapolation",
    "Parting",
    "Row",
    "Sensitivity",
    "apart",
    "band",
    "compare",
    "departures",
    "extrapolate",
    "first_of_each",
    "logged_in",
    "names",
    "noise_band",
    "parting",
    "same",
    "sensitivity",
    "stays",
]

#: Runs that are laid over the first one unless told otherwise; each is read whole.
PAIRS = 7


@dataclass(frozen=True)
class Comparison:
    """Runs side by side; the first is what the others are compared with.

    Attributes:
        rows: the runs.
        differs: fact -> its text in each run ("" where it is not known), of those that are not equal.
        partings: one per run that was laid over the first.
        sensitivity: one per size with `LEAST` learning rates.
        extrapolation: one per learning rate with `LEAST` sizes.
    """

    rows: tuple[Row, ...]
    differs: dict[str, tuple[str, ...]]
    partings: tuple[Parting, ...]
    sensitivity: tuple[Sensitivity, ...]
    extrapolation: tuple[Extrapolation, ...]


def compare(runs: Sequence[Run], pairs: int = PAIRS, show: Sequence[str] = ()) -> Comparison:
    """Lay runs side by side.

    Args:
        runs: opened runs, the reference first.
        pairs: how many of the others are laid over it, in their order.
        show: columns, ``metric.column``, whose last values stand in the rows.

    Cost: for the partings, one read of every common series of each run: 1.2 s of CPU time for two runs of 900 series
    over 10,000 steps.
    """
    rows = tuple(row(run, name, show) for run, name in zip(runs, names([r.path for r in runs]), strict=True))
    others = range(1, min(len(runs), pairs + 1))
    return Comparison(
        rows,
        differs(runs, rows),
        tuple(parting(runs[0], runs[i], i) for i in others),
        tuple(sensitivities(runs, rows)),
        tuple(extrapolations(runs, rows)),
    )
