"""How far the predictions on the first batch of the run have moved since an earlier look.

Source: Du et al. (2022), Sharpness-aware training for free, arXiv 2205.14083, whose regulariser this is;
here it is only measured. A temperature of 5 is said to be theirs.
"""

from __future__ import annotations

import math
from collections import deque

from torch import Tensor
from torch.nn import functional as F

from monitor.curvature.probes import trajectory_kl
from monitor.errors import UsageError
from monitor.probes._cross_entropy import counted_rows
from monitor.probes._model import outputs
from monitor.record.probe import Moment, Probe

STATS = ("kl", "changed", "steps", "temperature", "rows")
#: Rows of the batch that are followed, evenly spaced.
ROWS = 256
#: What stands for -inf, whose difference to itself would be NaN.
_MASKED = -1e30


class TrajectoryKL(Probe):
    """Measures ``trajectory_kl``: one forward of the same examples at each look, without gradients.

    Args:
        inputs: ``(sample, …)``, what the model is called with. Default: the first batch of the run, and of it the
            scores that its first cross-entropy was given.
        gap: compare with so many looks before. The paper has 3 epochs: give ``every`` the steps of an epoch, and 3.
        temperature: τ, by which scores are divided.
        every: look at each so many steps. Default: as often as 0.5 % of the run's time allows; the steps between two
            looks then vary, and are recorded.

    Raises:
        UsageError: if ``gap`` is below 1 or ``temperature`` not above 0.

    Holds the scores of 256 rows for each of ``gap`` looks, on the CPU.

    Example:
        monitor.attach(model, probes=[TrajectoryKL(every=500)])
    """

    name = "trajectory_kl"
    share = 0.005

    def __init__(
        self, inputs: Tensor | None = None, gap: int = 1, temperature: float = 5.0, every: int | None = None
    ) -> None:
        if gap < 1 or not 0 < temperature < math.inf:
            raise UsageError(f"gap={gap!r}, temperature={temperature!r}; expected a number >= 1, and one above 0")
        self.inputs = None if inputs is None else inputs.detach().clone()
        self.keeps_first = inputs is None
        self.gap = gap
        self.temperature = temperature
        self.every = every
        self.begin()

    def begin(self) -> None:
        """Forget the run before."""
        self._looks: deque[tuple[int, Tensor]] = deque(maxlen=self.gap)

    def measure(self, moment: Moment) -> None:
        """One forward; a comparison as soon as there is an earlier look."""
        now = self._scores(moment)
        if len(self._looks) == self.gap:
            step, past = self._looks[0]
            if past.shape != now.shape:
                raise UsageError(f"the scores have shape {list(now.shape)}, before it was {list(past.shape)}")
            kl, changed = moved(past, now, self.temperature)
            moment.emit("trajectory_kl", STATS, "", (kl, changed, moment.step - step, self.temperature, len(now)))
        self._looks.append((moment.step, now))

    def _scores(self, moment: Moment) -> Tensor:
        """``(row, class)`` float32 on the CPU."""
        with moment.evaluation():
            if self.inputs is not None:
                scores = outputs(moment.model, self.inputs)
            elif moment.first is not None:
                scores = next(
                    (z for call in moment.first.calls(F.cross_entropy) if len(z := counted_rows(*call[:2]))), None
                )
            else:
                scores = None
        if scores is None or scores.shape[1] < 2:
            raise UsageError("there are no scores of two or more classes: the loss has no cross-entropy; pass inputs=")
        return scores[:: -(-len(scores) // ROWS)].float().cpu()


def moved(past: Tensor, now: Tensor, temperature: float) -> tuple[float, float]:
    """Mean KL divergence in nats, and the share of rows whose most probable class is another.

    Args:
        past: ``(row, class)`` scores at the earlier look.
        now: ``(row, class)`` scores of the same rows.
        temperature: τ.

    Returns:
        NaN for both where a score is NaN or +inf; a class of -inf, masked, has probability 0.
    """
    if not bool((past < math.inf).all() and (now < math.inf).all()):
        return math.nan, math.nan
    kl = trajectory_kl(past.clamp(min=_MASKED), now.clamp(min=_MASKED), temperature=temperature)
    return max(0.0, kl), float((past.argmax(1) != now.argmax(1)).double().mean())
