"""Whether a network that has memorised its training data is about to generalise, told from training alone: a hint.

From memorisation on (t_mem of `phases`) a marker votes, at each evaluation, if the Theil–Sen slope of its last five has
the sign that it has on the way to generalisation:

    Gini, z-score of the target                                               rises
    odd fraction, norm of all parameters, local complexity, routing dimension falls

    agreed   three or more vote, at five evaluations in a row (of the marker measured least often)
    moved    a leading marker votes, and has moved far: the Gini coefficient by half of what it was at t_mem, or the odd
             fraction to half of it; at five evaluations in a row

Tried on 57 trainings of small networks, evaluated 60 to 180 times: arithmetic modulo 31 to 113, parities, digits, text.
22 generalised after they had memorised, 31 did not (random labels, too few examples, no weight decay), 4 had at once.

                                                later   ahead   never     at once
    agreed                                   14 of 22       7   22 of 31   3 of 4
    moved, the runs by which it was chosen     8 of 8       7    0 of 11   0 of 1
    moved, the others                        12 of 14      10    1 of 18   0 of 1

Ahead: before the held-out accuracy had gone half of its way, among the others by 125 to 640 steps; measured a fifth as
often ``moved`` found as many, but 3 ahead. It missed products, whose embedding is sparse in another basis than that of
sums, and was wrong about a sum without weight decay, when its softmax had collapsed. Several of the others differ from
those by which it was chosen in their seed alone.

So ``agreed`` says next to nothing: networks drift this way whether anything comes of it or not (the Gini coefficient
rises while the effective rank of the hidden weights falls in 29 of the 31). ``moved`` says something, of networks and
tasks as small as these. Nothing is judged by either, and neither is worth a look where held-out data are at hand.

Source: definition, ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from monitor.diagnosis.phases import Steps, memorised_at
from monitor.metric import Array

if TYPE_CHECKING:
    from monitor.store.run import Run

#: Evaluations of a slope, evaluations in a row that must agree, and votes that it takes.
SLOPE, HELD, VOTES = 5, 5, 3
#: What must be said with whatever is said.
CAVEAT = "no held-out data: indirect evidence"


@dataclass(frozen=True)
class Record:
    """Runs in which something was seen, of those in which it could have been."""

    generalised: tuple[int, int]
    never: tuple[int, int]


#: Of the runs that the head of this file tells of; ``moved`` without those by which it was chosen.
MOVED, AGREED = Record((12, 14), (1, 18)), Record((14, 22), (22, 31))


@dataclass(frozen=True)
class Marker:
    """A column, whether it rises (1) or falls (-1) before a transition, and the factor by which one that leads must."""

    ref: str
    sign: Literal[-1, 1]
    factor: float | None = None


MARKERS = (
    Marker("gini.gini", 1, 1.5),
    Marker("odd_fraction.omega", -1, 0.5),
    Marker("param_norm.norm", -1),
    Marker("local_complexity.cut", -1),
    Marker("routing_dimension.dimension", -1),
    Marker("zscore_target.mean", 1),
)


@dataclass(frozen=True)
class Vote:
    """What a marker says at the last evaluation: the sign of its slope is right, and its value over that at t_mem."""

    ref: str
    agrees: bool
    factor: float


@dataclass(frozen=True)
class Transition:
    """What the markers say since memorisation.

    Attributes:
        memorised: t_mem.
        votes: of the markers that were measured often enough, the leading ones first.
        moved: step at which a leading marker had moved far enough for five evaluations, None if none has.
        agreed: step at which three or more markers had agreed for five evaluations, None if they have not.
        why: why ``moved`` or ``agreed`` cannot be told, "" if both can.
    """

    memorised: int
    votes: tuple[Vote, ...]
    moved: int | None
    agreed: int | None
    why: str


def slopes(steps: Steps, values: Array) -> Array:
    """Theil–Sen slope of each evaluation with the four before it, ``(evaluation,)``; NaN for the first four.

    Args:
        steps: ``(evaluation,)`` ascending.
        values: ``(evaluation,)``; a slope over one that is not finite is no number to rely on.

    Returns:
        The median of the slopes of all ten pairs, per step.

    Source: Theil (1950), Sen (1968).
    """
    found = np.full(len(values), np.nan)
    if len(values) >= SLOPE:
        x, y = (np.lib.stride_tricks.sliding_window_view(a, SLOPE) for a in (steps, values))
        with np.errstate(invalid="ignore"):
            pairs = [(y[:, j] - y[:, i]) / (x[:, j] - x[:, i]) for i, j in combinations(range(SLOPE), 2)]
            found[SLOPE - 1 :] = np.median(pairs, axis=0)
    return found


def judge(series: Mapping[Marker, tuple[Steps, Array]], memorised: int) -> Transition:
    """What markers say from memorisation on.

    Args:
        series: marker -> its steps and values ``(evaluation,)``; those before memorisation are left out, and a marker
            of which too few are left.
        memorised: t_mem.
    """
    since = {m: (at[at >= memorised], values[at >= memorised]) for m, (at, values) in series.items()}
    since = {m: s for m, s in since.items() if len(s[0]) >= SLOPE + HELD - 1}
    moved = [_held(at, _far(m, at, values)) for m, (at, values) in since.items() if m.factor is not None]
    why = []
    if not moved:
        why.append(f"none of {_names([m for m in MARKERS if m.factor is not None])} was measured often enough")
    if len(since) < VOTES:
        why.append(f"of the {VOTES} markers it takes there is {_names(list(since)) or 'none'}")
    common = _common([at for at, _ in since.values()])
    ballots = {m: _right(m, common, v[np.searchsorted(at, common, side="right") - 1]) for m, (at, v) in since.items()}
    with np.errstate(divide="ignore", invalid="ignore"):
        votes = tuple(Vote(m.ref, bool(b[-1]), float(since[m][1][-1] / since[m][1][0])) for m, b in ballots.items())
    agreed = _held(common, np.sum(list(ballots.values()), axis=0) >= VOTES) if len(since) >= VOTES else None
    return Transition(memorised, votes, min((s for s in moved if s is not None), default=None), agreed, "; ".join(why))


def _right(marker: Marker, steps: Steps, values: Array) -> npt.NDArray[np.bool_]:
    return marker.sign * slopes(steps, values) > 0


def _far(marker: Marker, steps: Steps, values: Array) -> npt.NDArray[np.bool_]:
    """Where the slope is right, and the value has moved by the marker's factor since the first one."""
    assert marker.factor is not None
    return _right(marker, steps, values) & (marker.sign * values >= marker.sign * marker.factor * values[0])


def _held(steps: Steps, mask: npt.NDArray[np.bool_]) -> int | None:
    """The first evaluation that ends `HELD` in a row that are all true."""
    held = np.lib.stride_tricks.sliding_window_view(mask, HELD).all(axis=1) if len(mask) >= HELD else mask[:0]
    return int(steps[np.argmax(held) + HELD - 1]) if held.any() else None


def _common(several: Sequence[Steps]) -> Steps:
    """The steps of the marker measured least often, from where all have been measured."""
    if not several:
        return np.zeros(0, np.int64)
    return (least := min(several, key=len))[least >= max(at[0] for at in several)]


def _names(markers: Sequence[Marker]) -> str:
    return ", ".join(m.ref.partition(".")[0] for m in markers)


def told(t: Transition) -> str:
    """What the markers say in a line, and how often the same was seen where nothing came of it.

    Args:
        t: what is told.

    Returns:
        The line; "" if too little was measured to say anything, of which ``t.why`` tells.
    """
    leading = {m.ref for m in MARKERS if m.factor is not None}
    factors = ", ".join(f"{v.ref.partition('.')[0]} ×{v.factor:.2f}" for v in t.votes if v.ref in leading)
    parts = [f"{factors} since, not far enough"] if factors else []
    if t.moved is not None:
        (a, b), (c, d) = MOVED.generalised, MOVED.never
        record = f"as in {a} of {b} runs that generalised later and {c} of {d} that never did"
        parts = [f"{factors} since, far enough from step {t.moved:,} on ({record})"]
    if t.agreed is not None:
        c, d = AGREED.never
        record = f"also agreed on {c} of {d} runs that never generalised"
        parts.append(f"{VOTES} of {len(t.votes)} markers agree from step {t.agreed:,} on ({record})")
    elif len(t.votes) >= VOTES:
        parts.append(f"no {VOTES} of {len(t.votes)} markers agreed")
    return "; ".join([f"{CAVEAT}; learned at step {t.memorised:,}", *parts]) if parts else ""


def transition(run: Run) -> Transition | None:
    """What the markers of a recorded run say; None if it has not memorised its training data, as far as is known.

    Cost: one read of the markers' columns, one of them as many series as there are parameters.
    """
    memorised = memorised_at(run)
    if memorised is None:
        return None
    return judge({m: _whole(run, m.ref, memorised) for m in MARKERS if run.modules(m.ref)}, memorised)


def _whole(run: Run, ref: str, first: int) -> tuple[Steps, Array]:
    """One number a step: the root of the sum of squares over modules, at steps at which all were measured."""
    block = run.block(ref, first=first)
    whole = block.has(ref).all(axis=1)
    return block.steps[whole], np.sqrt(np.square(block[ref][whole]).sum(axis=1))
