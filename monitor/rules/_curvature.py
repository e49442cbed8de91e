"""What several rules over curvature need: where the batch is all the data, and earlier measurements."""

from __future__ import annotations

import numpy as np

from monitor.metric import Array, Mask
from monitor.rule import Window
from monitor.rules._series import Steps, exactly, latest

#: What "calibrated" means in the parameters of these rules: GD, momentum and Adam on full batches of digits, stable, at
#: the edge and above it, with tanh and ReLU (16), and the trainings of tests/integration/trainings.py (8).
CALIBRATION = "calibrated on 24 small trainings, measured every 5 to 25 steps"
#: Column that `of_step` reads.
OF_STEP = "sharpness.of_step"
#: Steps without another batch that show that there is only one.
_SAME = 10


def whole_data(window: Window, steps: Steps) -> Mask:
    """Where every step trains on the same batch, so that its curvature is that of all the data.

    Nowhere if several processes train, each on a batch of its own: measured is that of the first.

    Args:
        window: with ``input_rms.fingerprint``, and at least `_SAME` points of lookback.
        steps: ``(step,)`` int64.

    Returns:
        ``(step, 1)``: True where the inputs of the last 10 steps (at the start: of at least 3) have one fingerprint.
    """
    block = window["input_rms.fingerprint"]
    if not len(block.steps) or window.facts.get("processes", 1) > 1:
        return np.zeros((len(steps), 1), dtype=np.bool_)
    (name,) = block.names
    values, has = block[name], block.has(name)
    changed = np.ones(len(values), dtype=np.int64)
    changed[1:] = ~((values[1:] == values[:-1]) & has[1:] & has[:-1]).all(axis=1)
    seen = np.concatenate([[0], np.cumsum(changed)])
    end = np.searchsorted(block.steps, steps, side="right")
    begin = np.maximum(end - _SAME, 0)
    # the first row of a window is compared with none
    same = seen[end] - seen[np.minimum(begin + 1, len(values))] == 0
    return (same & (end - begin >= 3))[:, None]


def at(window: Window, ref: str, steps: Steps) -> tuple[Array, Mask]:
    """One column of the whole run at just these steps: values and where there are any, ``(step, 1)``."""
    return exactly(window[ref], steps, ("",))


def of_step(window: Window, steps: Steps) -> Mask:
    """Where the loss that was measured last is that of the step, ``(step, 1)``; also if nothing is recorded of that.

    Args:
        window: with `OF_STEP`.
        steps: ``(step,)`` int64.
    """
    value, has = latest(window[OF_STEP], steps, ("",))
    return ~(has & (value == 0))


def before(values: Array, back: int) -> Array:
    """``values`` ``(point, 1)`` of the ``back`` points before each, ``(point, back)``; NaN where there are none."""
    if not len(values):
        return np.zeros((0, back))
    padded = np.concatenate([np.full((back, 1), np.nan), values])
    return np.lib.stride_tricks.sliding_window_view(padded[:-1, 0], back)
