"""The loss scale finds no value that lasts: updates are skipped again and again.

What it means:
    A ``GradScaler`` halves its scale and skips the update whenever a gradient is infinite or NaN. Once in two thousand
    updates that is how it searches. If it goes on, gradients overflow whatever the scale is: activations or gradients
    are beyond 65,504 in float16, or the training diverges; and each skipped update is a batch that taught nothing. At
    a scale below 1 hardly anything of a gradient is left in float16.

How it is decided:
    Among the last 500 updates 10 or more (2 %) came after skipped ones; or, with a scale below 128, 3 or more of the
    last 100. However many are skipped in a row, they count once, so that the first search for a scale does not.
    Critical if 20 were skipped in a row down to a scale below 1. Skipped ones after which no update was made any more
    are recorded when the run ends.

What to do:
    Compute in bfloat16, which needs no scale. Else find the layer that overflows: its activations or gradients are the
    largest (residual_stream.max_abs, grad_norm.max_abs); normalise before it, or keep it in float32. See that loss and
    data are finite.

When it is wrong:
    A scaler with a growth interval of 50 updates or less searches that often by itself: raise it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from monitor.metric import Array, Mask
from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._series import exactly

SCALE, SKIPPED = "loss_scale.scale", "loss_scale.skipped"


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Updates among whose last ones too many came after skipped ones."""
    block = window[SCALE]
    steps, modules, scale, has = block.steps, block.modules, block[SCALE], block.has(SCALE)
    skipped, known = exactly(window[SKIPPED], steps, modules)
    event = known & (skipped > 0)
    often, lately = _of_last(event, int(p["window"])), _of_last(event, int(p["lately"]))
    lost = event & (skipped >= p["in_a_row"]) & (scale < p["end"])
    low = event & (scale < p["low"]) & (lately >= p["falling"])
    mask = (event & (often >= p["share"] * p["window"])) | low | lost
    value = often / p["window"]
    evidence = {"scale": scale, "skipped_in_a_row": skipped}
    yield Hits(steps, modules, mask, has & known, value, p["share"], evidence, critical=lost)


def _of_last(event: Mask, rows: int) -> Array:
    """How many of each row and the ``rows - 1`` before it are True, ``(row, module)``."""
    total = np.cumsum(np.pad(event, ((1, 0), (0, 0))), axis=0, dtype=np.int64)
    end = np.arange(1, len(event) + 1)
    return (total[end] - total[np.maximum(end - rows, 0)]).astype(np.float64)


RULE = Rule(
    id="loss_scale_thrash",
    title="Loss scale without rest",
    severity="warning",
    site="gradient",
    message="{value:.1%} of the last 500 updates came after skipped ones, this one after {skipped_in_a_row:.0f}; the "
    "loss scale is {scale:.3g}.",
    refute="gradients are finite at the present scale, and it grows again",
    remedies=(
        Remedy("compute in bfloat16, which needs no loss scale"),
        Remedy("find the layer that overflows float16 and keep it in float32, or normalise before it"),
    ),
    params=(
        Param("share", 0.02, "fraction", "own choice: forty times that of a scaler that searches every 2,000 updates"),
        Param("window", 500, "updates", "own choice"),
        Param("low", 128, "1", "own choice: 65,536 is usual"),
        Param("falling", 3, "updates", "own choice"),
        Param("lately", 100, "updates", "own choice"),
        Param("in_a_row", 20, "skipped", "own choice: from 65,536 to 1 it takes 16"),
        Param("end", 1, "1", "definition: below it the scale makes small gradients smaller"),
    ),
    needs=(SCALE, SKIPPED),
    check=check,
    lookback=500,
    hold=1,
    release=200,
    doc=__doc__ or "",
)
