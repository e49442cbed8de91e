"""How sure a classifier is of the label of every row, and a book that is kept of that for every example.

Source: Pleiss et al. (2020), Identifying mislabeled data using the area under the margin ranking, arXiv 2001.10528.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

STATS = ("examples", "visits", "negative", "earlier", "whole")
#: Visits of an example without which its mean margin says nothing.
VISITS = 4
#: Examples of which a book is kept.
MOST = 1 << 18
#: `earlier` is the share when there had been so much of the present number of visits.
_EARLIER = 2 / 3


def margins(z: Tensor, y: Tensor, ignore_index: int) -> Tensor:
    """The logit of the label minus the largest other one: ``(row,)`` float32, NaN for rows that do not count.

    Args:
        z: ``(row, class)`` logits or log-probabilities, of at least two classes; read only.
        y: ``(row,)`` int64.
        ignore_index: rows with this class do not count.

    Cost: a copy of ``z`` and two reads; no host sync.
    Source: arXiv 2001.10528, eq. 1.
    """
    ignored = y == ignore_index
    at = y.masked_fill(ignored, 0).unsqueeze(1)
    others = z.scatter(1, at, -torch.inf).amax(1)
    return (z.gather(1, at).squeeze(1) - others).float().masked_fill_(ignored, torch.nan)


class Book:
    """Visits, label and mean margin of every example.

    Attributes:
        visits: of all examples together, those of examples that are not followed too.
        changed: of those, how many had another label than before.
    """

    def __init__(self) -> None:
        self._places: dict[Hashable, int] = {}
        self._count = np.zeros(0, np.int32)
        self._sum = np.zeros(0, np.float64)
        self._label = np.zeros(0, np.int64)
        self._shares: list[tuple[float, float]] = []  # mean visits, share of negative ones
        self.visits = self.changed = 0

    def __len__(self) -> int:
        return len(self._places)

    def enter(self, names: Sequence[Hashable], labels: np.ndarray, margins: np.ndarray) -> None:
        """One visit of each of ``names``; without effect where the margin is NaN, or once there are `MOST` examples."""
        places, before = self._places, len(self._places)
        room = before < MOST
        at = np.array([places.setdefault(n, len(places)) if room else places.get(n, -1) for n in names], np.int64)
        if len(places) > len(self._count):
            size = max(1024, 2 * len(places))
            for name in ("_count", "_sum", "_label"):
                old = getattr(self, name)
                grown = np.zeros(size, old.dtype)
                grown[: len(old)] = old
                setattr(self, name, grown)
        self.visits += len(at)
        good = (at >= 0) & ~np.isnan(margins)
        at, labels = at[good], labels[good]
        known = self._count[at] > 0
        self.changed += int(np.count_nonzero(known & (self._label[at] != labels)))
        self._label[at] = labels
        np.add.at(self._count, at, 1)
        np.add.at(self._sum, at, margins[good])

    def statistics(self) -> list[float] | None:
        """The numbers `STATS`; None while fewer than half of the examples have enough visits.

        They are the examples that have, the mean visits of all, the share of the first whose mean margin is negative,
        the same when there had been two thirds as many visits (NaN if that is not known), and the share of those that
        belong to labels most of whose examples are negative.
        """
        n = len(self)
        enough = self._count[:n] >= VISITS
        count, label = self._count[:n], self._label[:n][enough]
        if 2 * len(label) < max(n, 1):
            return None
        negative = self._sum[:n][enough] < 0
        visits, share = float(count.mean()), float(negative.mean())
        earlier = [s for v, s in self._shares if v <= _EARLIER * visits]
        self._shares.append((visits, share))
        _, which = np.unique(label, return_inverse=True)
        of_label = np.bincount(which, negative) / np.bincount(which)
        whole = float((of_label[which] > 0.5)[negative].mean()) if share else 0.0
        return [float(len(label)), visits, share, earlier[-1] if earlier else float("nan"), whole]

    def table(self) -> dict[str, np.ndarray | list[str]]:
        """``example``, ``label``, ``visits`` and ``margin`` (the mean) of all examples, the least margin first."""
        n = len(self)
        with np.errstate(invalid="ignore"):
            mean = self._sum[:n] / self._count[:n]
        order = np.argsort(mean, kind="stable")  # NaN, of those that never counted, last
        names = list(self._places)
        plain = all(isinstance(x, int) for x in names)
        named = np.array(names, np.int64)[order] if plain else [str(names[i]) for i in order]
        return {
            "example": named,
            "label": self._label[:n][order].astype(np.int32),
            "visits": self._count[:n][order],
            "margin": mean[order].astype(np.float32),
        }
