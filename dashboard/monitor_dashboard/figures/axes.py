"""Limits of scales and the labels on them: numbers alone, nothing is drawn here."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from monitor.diagnosis.text import number
from monitor_dashboard.sampling import Floats

#: Beyond it the ends of a scale, or their distance, would not be numbers; such values stand on its edge.
_LARGEST = 5e307


def limits_of(values: Sequence[Floats], log: bool) -> tuple[float, float]:
    """Ends of a scale that hold every finite value, with some room; exponents of ten on a log scale."""
    stacked = np.concatenate([np.asarray(v) for v in values]) if values else np.zeros(0)
    stacked = np.clip(stacked[np.isfinite(stacked)], -_LARGEST, _LARGEST)
    low, high = span(np.log10(stacked[stacked > 0]) if log else stacked)
    pad = 0.06 * (high - low)
    return (max(low - pad, -320.0), min(high + pad, 308.0)) if log else (low - pad, high + pad)


def span(values: Floats) -> tuple[float, float]:
    """Least and largest finite value, drawn apart if they are the same; 0 and 1 if there is none."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    if not low and not high:
        return 0.0, 1.0
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-300):
        spread = abs(low) * 0.1
        return low - spread, high + spread
    return low, high


def colour_ticks(low: float, high: float, log: bool) -> tuple[list[float], list[str]]:
    """Where a colour bar has labels, and which: up to four powers of ten, or its ends."""
    first, last = math.ceil(low), math.floor(high)
    if not log or last - first < 1:
        edge = 1e-4 * (high - low)  # a label right on the end is left out
        return [low + edge, high - edge], [number(float(f"{10**v if log else v:.2g}")) for v in (low, high)]
    powers = range(first, last + 1, -(-(last - first) // 3))
    return [float(k) for k in powers], [_power(k) for k in powers]


def scale(low: float, high: float, *, log: bool, room: int) -> tuple[list[float], list[str]]:
    """Where an axis has labels, and which: at least two round numbers, about ``room`` of them, all written alike.

    Args:
        low: lower limit of the axis, its exponent of ten if ``log``.
        high: upper limit, likewise.
        log: logarithmic axis.
        room: labels that fit.
    """
    if not log:
        step = _round_up((high - low) / room)
        while (last := math.floor(high / step + 1e-9)) <= (first := math.ceil(low / step - 1e-9)):
            step = _round_up(0.4 * step)
        values = [float(f"{i * step:.12g}") for i in range(first, last + 1)]
        return values, [_label(v, step, max(map(abs, values), default=0.0)) for v in values]
    first, last = math.ceil(low), math.floor(high)
    if last - first >= 1:
        powers = range(first, last + 1, -(-(last - first) // room))
        return [10.0**k for k in powers], [_power(k) for k in powers]
    for factors in ((1, 2, 5), (1, 3)):
        values = [float(f"{f}e{k}") for k in range(first - 1, last + 1) for f in factors]
        values = [v for v in values if low <= math.log10(v) <= high]
        if 2 <= len(values) <= room + 1:
            return values, [_label(v, v, max(values)) for v in values]
    return scale(10.0**low, 10.0**high, log=False, room=room)  # less than a factor of three


def _round_up(x: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is at least ``x``."""
    power = 10.0 ** math.floor(math.log10(x))
    return next((f * power for f in (1, 2, 5) if f * power >= x * (1 - 1e-9)), 10 * power)


def _label(value: float, step: float, largest: float) -> str:
    """A number of an axis whose neighbours are ``step`` away and whose largest is ``largest``."""
    if not value:
        return "0"
    place = math.floor(math.log10(step) + 1e-9)  # of the last digit that tells neighbours apart
    if 1e-3 <= largest < 1e5:
        return f"{value:,.{max(0, -place)}f}"
    mantissa, _, exponent = f"{value:.{max(0, math.floor(math.log10(abs(value)) + 1e-9) - place)}e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def _power(k: int) -> str:
    """Ten to the power of ``k``."""
    return f"{10.0**k:,g}" if -4 < k < 5 else f"1e{k}"
