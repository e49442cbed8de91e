"""Which samples of the first batch of the run are memorised, and since when, from their losses in evaluation mode.

Source: Li et al. (2025), Where to find Grokking in LLM Pretraining, arXiv 2506.21551, section 3; made causal by us.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from monitor.curvature.precision import double
from monitor.errors import UsageError
from monitor.record.probe import Moment, Probe, Sparsely

STATS = ("memorised", "judged", "median_step", "threshold", "sum_loss", "samples")
#: A loss may vary by this over the last looks (the paper's δ), and how many looks.
SPREAD, LOOKS = 0.05, 5
#: A loss is small up to this part of that of guessing: 1.6 nats for the vocabulary of the paper, whose ε is 1.5 to 2.
PART = 0.15
#: Samples of the batch that are followed, evenly spaced.
SAMPLES = 1024

Floats = npt.NDArray[np.float64]


class Memory:
    """The last losses of each sample, and since when it is memorised.

    A sample is memorised while its last ``looks`` losses are all at most ``threshold`` and within `SPREAD` of each
    other; since the first of the losses that made it so.

    Args:
        threshold: nats.
        looks: losses in a row.
    """

    def __init__(self, threshold: float, looks: int = LOOKS) -> None:
        self.threshold = threshold
        self.since: Floats = np.zeros(0)
        self._last: deque[tuple[int, Floats]] = deque(maxlen=looks)

    def look(self, step: int, losses: Floats) -> bool:
        """Take in one more look, ``(sample,)`` nats; True once there have been enough.

        ``since`` is then ``(sample,)``: the step since when each is memorised, NaN for those that are not.
        """
        if not len(self.since):
            self.since = np.full(len(losses), np.nan)
        self._last.append((step, losses))
        if len(self._last) < (self._last.maxlen or 0):
            return False
        window = np.stack([x for _, x in self._last])
        with np.errstate(invalid="ignore"):
            steady = np.ptp(window, axis=0) <= SPREAD
            now = steady & (window <= self.threshold).all(axis=0)
        self.since = np.where(now, np.where(np.isnan(self.since), self._last[0][0], self.since), np.nan)
        return True


class Memorisation(Probe):
    """Measures ``memorisation`` for every model whose loss has a cross-entropy.

    Args:
        every: measure at each so many steps. Default: as often as 0.5 % of the run's time allows.

    Of several cross-entropies the first with as many rows for each sample counts. Rows are taken to stand sample by
    sample, as in ``(sample · position, class)``. Class weights and label smoothing are left out.

    Example:
        monitor.attach(model, probes=[Memorisation()])
    """

    name = "memorisation"
    share = 0.005
    keeps_first = True

    def __init__(self, every: int | None = None) -> None:
        self.every = every
        self.begin()

    def begin(self) -> None:
        """Forget the run before."""
        self._memory: Memory | None = None
        self._sparsely = Sparsely()

    def measure(self, moment: Moment) -> None:
        """One forward of the first batch."""
        if moment.first is None:
            raise UsageError("there is no first batch")
        with moment.evaluation():
            calls = moment.first.calls(F.cross_entropy)
            found = next((x for args, kwargs, _ in calls if (x := _losses(args, kwargs, moment.samples))), None)
        if found is None:
            raise UsageError("the loss has no cross-entropy with as many rows for each sample of the batch")
        classes, losses = found
        if self._memory is None:
            self._memory = Memory(PART * math.log(classes))
        judged = self._memory.look(moment.step, losses)
        since = self._memory.since[~np.isnan(self._memory.since)]
        moment.emit(
            "memorisation", STATS, "",
            [
                len(since), len(losses) * judged, float(np.median(since)) if len(since) else math.nan,
                self._memory.threshold, float(losses.sum()), len(losses),
            ],
        )  # fmt: skip
        self._table(moment, losses)

    def _table(self, moment: Moment, losses: Floats) -> None:
        if self._memory is None or not self._sparsely.due(moment.step):
            return
        since = np.ma.masked_invalid(self._memory.since)
        columns = {"sample": np.arange(len(losses), dtype=np.int32), "loss": losses.astype(np.float32), "since": since}
        moment.table("memorisation", columns)


def _losses(args: tuple[Any, ...], kwargs: dict[str, Any], samples: int) -> tuple[int, Floats] | None:
    """Number of classes and ``(sample,)`` mean losses; None if the rows are not those of the samples."""
    z, y = (args[i] if len(args) > i else kwargs.get(name) for i, name in enumerate(("input", "target")))
    if not isinstance(z, Tensor) or not isinstance(y, Tensor) or z.dim() < 2:
        return None
    ignored = kwargs.get("ignore_index", args[4] if len(args) > 4 else -100)
    each = F.cross_entropy(z.float(), y, ignore_index=ignored, reduction="none")
    counts = torch.ones_like(each) if y.is_floating_point() else (y != ignored).float()
    if each.numel() == 0 or each.numel() % samples:
        return None
    rows, counts = double(each.reshape(samples, -1)), double(counts.reshape(samples, -1))
    step = -(-samples // SAMPLES)
    return z.shape[1], (rows.sum(1) / counts.sum(1))[::step].cpu().numpy()
