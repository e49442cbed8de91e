"""From memorising to generalising: when the training data were learned, when that held for other data, and in between.

    t_mem = first evaluation at which the training accuracy is at least 0.99, and at the two that follow
    t_gen = the same of the held-out accuracy;   delay ratio = t_gen / t_mem

An ordinary training has a ratio of at most 3; above 10 it is called grokking. Only where the held-out accuracy was more
than 0.3 behind at t_mem: one that creeps from 0.97 to 0.99 takes long too, and is no delay. Where no accuracy is known,
a loss of at most 1 % of its first value stands for an accuracy of 0.99, and 30 % of it for being behind.

What can be said without held-out data is in `transition`; it is little, and apart from this.

These need the whole history, which no rule has: a rule sees a bounded part of it, so that it can run beside a
training. The rules say what the state is (`grokking_phase`, `memorised_without_generalising`); this says, of a recorded
run, when.

Source: Power et al. (2022), Grokking: Generalization Beyond Overfitting on Small Algorithmic Datasets
(arXiv 2201.02177), for the phenomenon; marks and labels ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from monitor.metric import Array
from monitor.rules._series import POOL, POOLED_ROWS, logged_as, pooled

if TYPE_CHECKING:
    from monitor.store.run import Run

Steps = npt.NDArray[np.int64]
Label = Literal["normal", "delayed", "grokking", "memorised", "undecided"]
Quantity = Literal["accuracy", "loss"]

#: What says how well data are known, the one that is asked first.
QUANTITIES: tuple[Quantity, ...] = ("accuracy", "loss")
#: Accuracy that counts as learned, share of the first loss that does, and consecutive evaluations that must show it.
LEARNED, LOSS_LEFT, HELD = 0.99, 0.01, 3
#: Largest delay ratio of an ordinary and of a delayed training.
NORMAL, DELAYED = 3.0, 10.0
#: Difference of the accuracies above which what was learned does not hold for other data.
GAP = 0.3
#: Part of the way to `LEARNED` that a held-out accuracy has to go to be rising.
RISING = 0.1


@dataclass(frozen=True)
class Phase:
    """One stretch of a run: ``learning``, ``memorised``, ``generalising`` or ``generalised``; steps inclusive."""

    name: str
    first: int
    last: int


@dataclass(frozen=True)
class Phases:
    """What is known of a run's way to generalisation.

    Attributes:
        train: column that was taken for the training data, as ``"metric.column module"``.
        test: the same of the held-out data.
        memorised: t_mem, None if not reached.
        generalised: t_gen, None if not reached.
        ratio: t_gen / t_mem, None unless both are known.
        gap: training accuracy minus held-out accuracy at the last evaluation; of losses, held-out minus training loss.
        label: ``normal`` also where the held-out data were never far behind; ``memorised`` if only t_mem was reached
            and the gap is above 0.3; ``undecided`` if neither says anything.
        timeline: the phases that occurred, in order.
    """

    train: str
    test: str
    memorised: int | None
    generalised: int | None
    ratio: float | None
    gap: float
    label: Label
    timeline: tuple[Phase, ...]


def learned_at(steps: Steps, learned: npt.NDArray[np.bool_]) -> int | None:
    """The first of `HELD` consecutive evaluations that all show it; None if there are none.

    Args:
        steps: ``(evaluation,)`` int64.
        learned: ``(evaluation,)`` bool.
    """
    held = np.lib.stride_tricks.sliding_window_view(learned, HELD).all(axis=1) if len(learned) >= HELD else learned[:0]
    return int(steps[np.argmax(held)]) if held.any() else None


def judge(
    train: tuple[Steps, Array], test: tuple[Steps, Array], *, losses: bool = False, names: tuple[str, str] = ("", "")
) -> Phases:
    """The phases from two series.

    Args:
        train: ``(evaluation,)`` steps and accuracies (or losses) of the training data, not empty; NaN is never learned.
        test: the same of the held-out data.
        losses: the values are losses.
        names: of the two series.
    """
    (at_train, a), (at_test, b) = train, test
    good_a, good_b = (_small(v) if losses else v >= LEARNED for v in (a, b))
    memorised, generalised = learned_at(at_train, good_a), learned_at(at_test, good_b)
    latest = a[max(int(np.searchsorted(at_train, at_test[-1], side="right")) - 1, 0)]
    gap = float(b[-1] - latest if losses else latest - b[-1])
    ratio = generalised / max(memorised, 1) if memorised is not None and generalised is not None else None
    label: Label = "undecided"
    if ratio is not None and memorised is not None:
        then = b[max(int(np.searchsorted(at_test, memorised, side="right")) - 1, 0)]
        behind = then > GAP * b[0] if losses else then < LEARNED - GAP
        label = "normal" if ratio <= NORMAL or not behind else "delayed" if ratio <= DELAYED else "grokking"
    elif memorised is not None and gap > (LOSS_LEFT * b[0] if losses else GAP):
        label = "memorised"
    end = int(max(at_train[-1], at_test[-1]))
    begin = int(min(at_train[0], at_test[0]))
    rising = None if memorised is None else _rising(at_test, b, memorised, losses)
    marks = [("learning", begin), ("memorised", memorised), ("generalising", rising), ("generalised", generalised)]
    return Phases(*names, memorised, generalised, ratio, gap, label, _timeline(marks, end))


def _small(losses: Array) -> npt.NDArray[np.bool_]:
    """Where hardly anything is left of the first loss; nowhere if that is no size to compare with."""
    first = losses[0]
    return losses <= LOSS_LEFT * first if np.isfinite(first) and first > 0 else np.zeros(len(losses), dtype=np.bool_)


def _rising(steps: Steps, values: Array, memorised: int, losses: bool) -> int | None:
    """The first evaluation after memorisation from which on a tenth of the way has been gone."""
    after = steps >= memorised
    if not after.any():
        return None
    base = values[after][0]
    goal = LOSS_LEFT * values[0] if losses else LEARNED
    gone = (base - values) if losses else (values - base)
    return learned_at(steps[after], (gone >= RISING * abs(goal - base))[after])


def _timeline(marks: list[tuple[str, int | None]], end: int) -> tuple[Phase, ...]:
    """Phases from where each begins; one that begins after a later one has begun did not occur."""
    known = [(name, first) for name, first in marks if first is not None]
    kept = [(name, first) for i, (name, first) in enumerate(known) if all(first < later for _, later in known[i + 1 :])]
    ends = [first - 1 for _, first in kept[1:]] + [end]
    return tuple(Phase(name, first, max(first, last)) for (name, first), last in zip(kept, ends, strict=True))


def phases(run: Run) -> Phases | None:
    """The phases of a recorded run; None if it has no held-out accuracy or loss to judge by.

    The held-out series is one that the script logged under a usual name (``val_acc``, ``test/accuracy``,
    ``eval_loss``); the training series is a logged one, else the accuracy or loss of the batches trained on, the
    accuracy over the last 512 rows. Without a logged one, the losses that `monitor.probes.FourierLosses` measures.
    """
    logged = run.modules("logged.value")
    for quantity in QUANTITIES:
        held = logged_as(logged, quantity)
        if not held or (found := _training(run, quantity)) is None:
            continue
        (train, name), test = found, run.series("logged.value", held[0])
        if len(train[0]) and len(test[0]):
            return judge(train, test, losses=quantity == "loss", names=(name, f"logged.value {held[0]}"))
    pair = ("restricted_loss.train", "restricted_loss.test")
    train, test = (run.series(ref) if run.modules(ref) else None for ref in pair)
    return judge(train, test, losses=True, names=pair) if train and test else None


def memorised_at(run: Run) -> int | None:
    """t_mem of a recorded run, which needs no held-out data; None if it was not reached, or nothing tells."""
    for quantity in QUANTITIES:
        found = _training(run, quantity)
        if found is None or not len(found[0][0]):
            continue
        steps, values = found[0]
        at = learned_at(steps, _small(values) if quantity == "loss" else values >= LEARNED)
        if at is not None:
            return at
    return None


def _training(run: Run, quantity: Quantity) -> tuple[tuple[Steps, Array], str] | None:
    """Accuracy or loss of the training data, and the name of the series; None if it is not known."""
    own = logged_as(run.modules("logged.value"), quantity, train=True)
    if own:
        return run.series("logged.value", own[0]), f"logged.value {own[0]}"
    modules = run.modules("train_accuracy.accuracy" if quantity == "accuracy" else "loss.value")
    if not modules:
        return None
    if quantity == "accuracy":
        return _batches(run, modules[0]), f"train_accuracy.accuracy {modules[0]}"
    return run.series("loss.value", modules[0]), f"loss.value {modules[0]}".rstrip()


def _batches(run: Run, module: str) -> tuple[Steps, Array]:
    steps, values = run.series("train_accuracy.accuracy", module)
    at, rows = run.series("train_accuracy.rows", module)
    counted = np.full(len(steps), np.nan)
    counted[np.isin(steps, at)] = rows[np.isin(at, steps)]
    return steps, pooled(values, counted, POOLED_ROWS, POOL)


@dataclass(frozen=True)
class LogTime:
    """A least-squares fit ``value = intercept + slope · ln t`` over a run's recorded steps.

    Attributes:
        slope: per e-fold of the step.
        intercept: at step 1.
        r2: share of the variance explained; NaN for a constant.
    """

    slope: float
    intercept: float
    r2: float


def log_time(steps: Steps, values: Array) -> LogTime | None:
    """How well a distance from the start grows like the logarithm of the steps.

    Args:
        steps: ``(point,)`` int64; those below 1 are left out.
        values: ``(point,)``, in units of the parameters.

    Returns:
        The fit; None with fewer than 3 finite points. Diffusion on a random landscape gives r2 near 1.

    Source: Hoffer, Hubara and Soudry (2017), Train longer, generalize better (arXiv 1705.08741), sec. 3.
    """
    usable = (steps >= 1) & np.isfinite(values)
    at, y = steps[usable], values[usable]
    if len(y) < 3:
        return None
    x = np.log(at)
    slope, intercept = np.polyfit(x, y, 1)
    rest = y - (intercept + slope * x)
    spread = float(np.square(y - y.mean()).sum())
    return LogTime(float(slope), float(intercept), 1 - float(np.square(rest).sum()) / spread if spread else np.nan)


def log_distance(run: Run) -> LogTime | None:
    """`log_time` of the distance of all parameters together from where the run began.

    Of steps at which the distance of any parameter is missing nothing is taken.

    Args:
        run: a recorded run.

    Returns:
        The fit; None if ``distance_from_start`` was recorded at fewer than 3 steps.
    """
    ref = "distance_from_start.distance"
    if not run.modules(ref):
        return None
    block = run.block(ref)
    whole = block.has(ref).all(axis=1)
    return log_time(block.steps[whole], np.sqrt(np.square(block[ref][whole]).sum(axis=1)))
