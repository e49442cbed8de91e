"""The optimizer steps several times with one gradient.

What it means:
    An update was made though no backward had run since the same optimizer's update before, with the very same gradient:
    ``step()`` is called twice, in the loop and again in a callback, a wrapper or a branch. The learning rate is that
    many times what it says, momentum and the bias correction of Adam count each gradient as several, and a schedule
    that follows the updates ends early.

How it is decided:
    At 3 or more of the last 20 looks there was no backward since the update before and the gradient was that of the
    update before, bit for bit; at others of them a backward was seen, so that there is one to miss.

What to do:
    Look for the second ``step()``: Trainers and GradScaler.step() call it themselves. Two updates are meant? Then a
    larger learning rate says so.

When it is wrong:
    A method that walks on along one gradient on purpose.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._series import exactly

BACKWARDS, SHARE = "gradient_reuse.backwards", "gradient_reuse.share"
LOOKS = 20


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Updates with the gradient of the one before."""
    block = window[BACKWARDS]
    backwards, has = block[BACKWARDS], block.has(BACKWARDS)
    share = exactly(window[SHARE], block.steps, block.modules)[0]
    repeated = has & (backwards == 0) & (share == 1)
    looks = min(int(p["looks"]), len(backwards))
    many, seen = (_recent(a, looks) for a in (repeated, has & (backwards > 0)))
    mask = repeated & (many >= p["least"]) & (seen > 0)
    judged = has & (repeated | (many == 0))  # of two updates for one backward the first is sound, and proves nothing
    yield Hits(block.steps, block.modules, mask, judged, backwards, 1.0, {"repeated": many, "looks": many + seen})


def _recent(marks: np.ndarray, looks: int) -> np.ndarray:
    """How many of each row and the ``looks`` - 1 before it are marked, ``(step, module)``."""
    total = np.cumsum(np.pad(marks, ((looks, 0), (0, 0))), axis=0, dtype=np.float64)
    return total[looks:] - total[: len(marks)]


RULE = Rule(
    id="update_without_backward",
    title="Several updates with one gradient",
    severity="warning",
    site="gradient",
    message="{repeated:.0f} of the last {looks:.0f} updates that were looked at had no backward of their own and used "
    "the gradient of the update before.",
    refute="step() is called once for every backward, or several updates with one gradient are meant",
    remedies=(
        Remedy("call optimizer.step() once per backward; trainers and GradScaler.step() call it themselves"),
        Remedy("if several updates with one gradient are meant: use a larger learning rate instead"),
    ),
    params=(
        Param("least", 3, "looks", "own choice: more than an accident; no healthy training has one"),
        Param("looks", LOOKS, "looks", "own choice: 620 updates"),
    ),
    needs=(BACKWARDS, SHARE),
    check=check,
    lookback=LOOKS,
    doc=__doc__ or "",
)
