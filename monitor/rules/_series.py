"""What several rules need: another column at the same steps, points that stand out, and how much rows still teach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from monitor.metric import Array, Block, Mask
from monitor.robust import baseline
from monitor.rule import Window

Steps = npt.NDArray[np.int64]

#: What "calibrated" means in the parameters of rules: the trainings of tests/fixtures/record_series.py and of
#: tests/integration/trainings.py, up to 28 seeds and learning rates each.
CALIBRATION = "calibrated on 21 kinds of healthy training: 1 false alarm in 122,300 steps"


def latest(block: Block, steps: Steps, modules: tuple[str, ...]) -> tuple[Array, Mask]:
    """The one column of ``block`` as it was last recorded at or before each step.

    Args:
        block: a block with one name, of any steps and modules.
        steps: ``(step,)`` int64.
        modules: names of the second axis wanted.

    Returns:
        Values (NaN where nothing was recorded) and where there are any, ``(step, module)``.
    """
    (name,) = block.names
    values, has = np.full((len(steps), len(modules)), np.nan), np.zeros((len(steps), len(modules)), dtype=np.bool_)
    row = np.searchsorted(block.steps, steps, side="right") - 1
    known = row >= 0
    if block.modules == modules:
        values[known], has[known] = block[name][row[known]], block.has(name)[row[known]]
    else:
        place = {m: i for i, m in enumerate(block.modules)}
        for i, m in enumerate(modules):
            if m in place:
                values[known, i] = block[name][row[known], place[m]]
                has[known, i] = block.has(name)[row[known], place[m]]
    values[~has] = np.nan
    return values, has


def exactly(block: Block, steps: Steps, modules: tuple[str, ...]) -> tuple[Array, Mask]:
    """The one column of ``block`` at just these steps and modules.

    Args:
        block: a block with one name, of any steps and modules.
        steps: ``(step,)`` int64.
        modules: names of the second axis wanted.

    Returns:
        Values (NaN where nothing was recorded) and where there are any, ``(step, module)``.
    """
    values, has = latest(block, steps, modules)
    there = np.isin(steps, block.steps)
    return np.where(there[:, None], values, np.nan), has & there[:, None]


def rolling_max(values: Array, size: int) -> Array:
    """``max(values[i : i + size])`` for every ``i``, along the first axis: ``(step - size + 1, module)``."""
    done = 1
    while 2 * done <= size:
        values = np.maximum(values[:-done], values[done:])
        done *= 2
    rest = size - done
    return np.maximum(values[:-rest], values[rest:]) if rest else values


@dataclass(frozen=True)
class Spikes:
    """Which points stand out; every array is ``(judged step, module)``.

    Attributes:
        mask: True where the point stands out.
        known: True where there were enough points before it to judge.
        count: int64, usable points in the window.
        median: of the window; NaN where the point is not even larger than most of it.
        z: robust standard deviations above the median; NaN likewise, inf where the window has no spread at all.
    """

    mask: Mask
    known: Mask
    count: npt.NDArray[np.int64]
    median: Array
    z: Array


def spikes(x: Array, usable: Mask, start: int, p: Mapping[str, float], floor: float = 0.0) -> Spikes:
    """Points that rise far above the points before them.

    A point stands out if it exceeds the median of its window by ``sigmas`` robust standard deviations, by ``floor``,
    and by ``record`` times what the ``company``-th largest point of the window exceeds it by. The last keeps smooth
    ripples and heavy tails, whose extremes come in company, from standing out.

    Args:
        x: ``(step, module)`` float64; take the logarithm first if only the ratio matters.
        usable: ``(step, module)`` bool, the points that count; non-finite ones never do.
        start: the first row to judge; earlier ones are context.
        p: ``window`` (rows looked back at, not counting the row itself), ``minimum`` (usable points without which
            nothing is judged), ``sigmas``, ``record`` and ``company`` (1, 2 or 3).
        floor: least excess, in units of ``x``.

    Cost: a few maxima per point; two sorts of a window for each point larger than most of its window.
    """
    window, company = int(p["window"]), int(p["company"])
    n, modules = len(x) - start, x.shape[1]
    usable = usable & np.isfinite(x)
    seen = np.zeros((len(x) + 1, modules), dtype=np.int64)
    np.cumsum(usable, axis=0, out=seen[1:])
    rows = np.arange(start, len(x))
    count = seen[rows] - seen[np.maximum(rows - window, 0)]
    known = usable[start:] & (count >= p["minimum"])
    found = Spikes(np.zeros_like(known), known, count, np.full(known.shape, np.nan), np.full(known.shape, np.nan))

    context = min(start, window)
    y = np.full((window + n, modules), -np.inf)
    y[window - context :] = np.where(usable, x, -np.inf)[start - context :]
    # the third largest of a window is at least the smallest of the maxima of its three thirds: almost nothing in a
    # healthy series is larger than that, so almost nothing has to be sorted
    third = window // 3
    highest = rolling_max(y, third)
    ceiling = np.minimum(highest[:n], np.minimum(highest[third:][:n], highest[2 * third :][:n]))
    row, module = np.nonzero(known & (y[window:] > ceiling))
    if not len(row):
        return found
    windows = y[row[:, None] + np.arange(window), module[:, None]]
    value, largest = y[row + window, module], np.partition(windows, -company, axis=1)[:, -company]
    larger = value > largest
    row, module, windows, value, largest = row[larger], module[larger], windows[larger], value[larger], largest[larger]
    # the point stands after its window, and only its baseline is wanted
    series = np.concatenate([windows, value[:, None]], axis=1).T
    base = baseline(series, np.isfinite(series), first=window, window=window, minimum=1)
    median, scale = base.median[-1], base.scale[-1]
    excess = value - median
    found.mask[row, module] = (
        (excess >= floor) & (excess >= p["sigmas"] * scale) & (excess > p["record"] * (largest - median))
    )
    found.median[row, module] = median
    found.z[row, module] = np.where(scale > 0, excess / scale, np.inf)
    return found


def teaching(window: Window, steps: Steps, modules: tuple[str, ...]) -> Array:
    """What the rows still teach: (1 − accuracy) + (1 − mean largest probability), ``(step, module)``.

    Absent parts count 0, so that a loss on soft targets, which has no accuracy, is judged by its probabilities.
    """
    parts = (latest(window[f"train_accuracy.{c}"], steps, modules)[0] for c in ("accuracy", "top1_mass"))
    return sum((np.nan_to_num(1 - part) for part in parts), start=np.zeros((len(steps), len(modules))))
