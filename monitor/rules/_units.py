"""What two rules over the units of a layer share: which layers are judged, and what a layer was before."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from monitor.metric import Array, Block, Mask
from monitor.rule import Window
from monitor.rules._series import Steps, exactly

#: Columns that `layers` reads, and the looks before the judged one that `before` looks back at.
UNITS, ROWS, ROLE = "dormant_units.units", "dormant_units.rows", "dormant_units.role"
LOOKS = 30
#: Values of the role.
OUTPUT, GATE = 1, 2

#: What the thresholds of both rules are calibrated on.
TRAININGS = (
    "calibrated on 180 healthy trainings, three looks each: MLPs of 16 to 1,024 units with 15 activation functions, "
    "up to 20 layers deep, CNNs, transformers, autoencoders, sparse ones too, GANs, policies, recurrent networks"
)


def layers(window: Window, block: Block, p: Mapping[str, float]) -> tuple[Mask, Array, Array, Array]:
    """Layers of enough units that were seen on enough rows and are not the model's output.

    Args:
        window: with `UNITS`, `ROWS` and `ROLE`.
        block: the column that is judged.
        p: ``units`` and ``rows``, the fewest.

    Returns:
        Which are judged, how many units and rows they have, and their role, ``(step, module)``.
    """
    (name,) = block.names
    units, rows, role = (exactly(window[ref], block.steps, block.modules)[0] for ref in (UNITS, ROWS, ROLE))
    judged = block.has(name) & np.isfinite(block[name]) & (units >= p["units"]) & (rows >= p["rows"]) & (role != OUTPUT)
    return judged, units, rows, role


def before(steps: Steps, value: Array, sound: Mask) -> Array:
    """The value at the last sound look of the `LOOKS` before each, ``(step, module)``; NaN if there is none."""
    looks = np.arange(len(steps))[:, None]
    last = np.maximum.accumulate(np.where(sound, looks, -1), axis=0)
    known = (last >= 0) & (looks - last <= LOOKS)
    return np.where(known, np.take_along_axis(value, np.maximum(last, 0), axis=0), np.nan)
