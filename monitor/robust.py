"""Rolling robust baselines: how far a point lies from the median of the recorded points before it.

    z_t = (x_t − median(w_t)) / max(1.4826 · MAD(w_t), FLOOR · |median(w_t)|),   w_t = the ``window`` rows before t

Median and MAD (the median of the absolute deviations from the median) do not move when a minority of the window is
wild, so a spike cannot hide the next one; the point itself is never in its own window, so it cannot hide itself.
Absent and non-finite points are left out of the window but keep their place in it, which makes a result depend on the
``window`` rows before it and on nothing else, however a series is cut into blocks.

Source: Rousseeuw and Croux (1993), Alternatives to the Median Absolute Deviation, for 1.4826; the floor is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from monitor.metric import Array, Mask

#: Standard deviation of a normal distribution divided by its MAD.
SIGMA_PER_MAD = 1.4826
#: Smallest scale, as a part of the median. 2^-9 is a quarter of bfloat16's eps: a constant series that flips between
#: two neighbouring bfloat16 numbers stays at |z| <= 4, and float32 rounding noise below 1e-3.
FLOOR = 2.0**-9
#: Points in a full window, and the fewest that make a baseline.
WINDOW, MINIMUM = 100, 20

# Windows are copied to be sorted, this many at a time: 256 full ones are 100 KiB, which stay in the cache and below the
# size from which malloc asks the system for fresh pages.
_CHUNK = 256


@dataclass(frozen=True)
class Baseline:
    """The window before each point; all ``(step, module)``.

    Attributes:
        median: float64, NaN where fewer than the minimum of points were recorded.
        scale: float64, one robust standard deviation, NaN where ``median`` is. 0 if most of the window is exactly 0.
        count: int64, finite recorded points in the window.
    """

    median: Array
    scale: Array
    count: npt.NDArray[np.int64]


def baseline(values: Array, has: Mask, *, first: int = 0, window: int = WINDOW, minimum: int = MINIMUM) -> Baseline:
    """Median and robust scale of the ``window`` rows before each row, per module.

    Args:
        values: ``(step, module)`` float64.
        has: ``(step, module)`` bool, True where a value was recorded.
        first: first row that is wanted; earlier ones are only looked back at and get no baseline.
        window: rows looked back at, not counting the row itself.
        minimum: finite recorded points without which there is no baseline, at least 1.

    Cost: two sorts of ``window`` values per point; 50 rows x 100 modules take 2 to 3 ms.
    Numerics: medians of float32 values, as runs record them; what is lost is 30,000 times smaller than the floor.
    """
    # (module, step) inside, so that every window is contiguous
    with np.errstate(over="ignore"):
        x = values.T.astype(np.float32)
    usable = has.T & np.isfinite(x)
    seen = np.zeros((x.shape[0], x.shape[1] + 1), dtype=np.int64)
    np.cumsum(usable, axis=1, out=seen[:, 1:])
    rows = np.arange(x.shape[1])
    count = seen[:, :-1] - seen[:, np.maximum(rows - window, 0)]

    # inf sorts behind every number, so the points that count stand first in a sorted window
    padded = np.full((x.shape[0], x.shape[1] + window), np.inf, dtype=np.float32)
    padded[:, window:][usable] = x[usable]
    windows = np.lib.stride_tricks.sliding_window_view(padded, window, axis=1)

    median, scale = np.full(x.shape, np.nan), np.full(x.shape, np.nan)
    module, step = np.nonzero((count >= max(minimum, 1)) & (rows >= first))
    for start in range(0, len(step), _CHUNK):
        at = module[start : start + _CHUNK], step[start : start + _CHUNK]
        w, n = windows[at], count[at]
        median[at] = middle = _median(w, n)
        with np.errstate(over="ignore"):
            mad = _median(np.abs(w - middle[:, None].astype(np.float32)), n)
        scale[at] = np.maximum(SIGMA_PER_MAD * mad, FLOOR * np.abs(middle))
    return Baseline(median.T, scale.T, count.T)


def _median(windows: npt.NDArray[np.float32], n: npt.NDArray[np.int64]) -> Array:
    """Median of the ``n`` smallest values of each row; ``windows`` is ``(row, value)``, ``n`` is ``(row,)``."""
    s, row = np.sort(windows, axis=-1), np.arange(len(n))
    return 0.5 * (s[row, (n - 1) // 2].astype(np.float64) + s[row, n // 2])


def robust_z(
    values: Array, has: Mask, *, first: int = 0, window: int = WINDOW, minimum: int = MINIMUM
) -> tuple[Array, Mask]:
    """Robust standard deviations between each point and the median of the points before it.

    Args:
        values: ``(step, module)`` float64.
        has: ``(step, module)`` bool, True where a value was recorded.
        first: first row that is wanted; earlier ones are only looked back at and get no z.
        window: rows looked back at, not counting the row itself.
        minimum: finite recorded points without which there is no baseline, at least 1.

    Returns:
        ``z`` and where there is one, ``(step, module)``. A recorded NaN or inf gives NaN or inf. Absent where the point
        is, where the window has fewer than ``minimum`` points, and where most of it is exactly 0: then there is no
        scale to compare with.
    """
    b = baseline(values, has, first=first, window=window, minimum=minimum)
    known = has & (b.scale > 0)
    z = np.full(values.shape, np.nan)
    with np.errstate(over="ignore"):
        z[known] = (values[known] - b.median[known]) / b.scale[known]
    return z, known
