"""What several rules need: another column at the same steps, points that stand out, what rows still teach, and more."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from monitor.metric import Array, Block, Mask
from monitor.robust import baseline
from monitor.rule import Window

Steps = npt.NDArray[np.int64]

#: Points of the learning rate that `raised` compares: the last ones with those before them.
RECENT, PAST = 10, 85

#: What "calibrated" means in the parameters of rules: the trainings of tests/fixtures/record_series.py and of
#: tests/integration/trainings.py, up to 28 seeds and learning rates each.
CALIBRATION = "calibrated on 21 kinds of healthy training: 1 false alarm in 122,300 steps"

#: Adversarial, policy gradients, Q-learning, contrastive, diffusion, variational, margins, regression down to rounding,
#: losses times 1e-6 and 1e6, batches of one, warm-ups, restarts, bfloat16, loss scales, sparse and several optimizers;
#: MLPs, CNNs, recurrent networks and transformers with every usual normalisation: 200 to 3,000 steps each.
ODD = "none in 62 odd but healthy trainings and the 8 of tests/integration/trainings.py"


def latest(block: Block, steps: Steps, modules: tuple[str, ...]) -> tuple[Array, Mask]:
    """The one column of ``block`` as it was last recorded at or before each step.

    Args:
        block: a block with one name, of any steps and modules.
        steps: ``(step,)`` int64.
        modules: names of the second axis wanted.

    Returns:
        Values (NaN where nothing was recorded) and where there are any, ``(step, module)``.
    """
    (name,) = block.names
    values, has = np.full((len(steps), len(modules)), np.nan), np.zeros((len(steps), len(modules)), dtype=np.bool_)
    row = np.searchsorted(block.steps, steps, side="right") - 1
    known = row >= 0
    if block.modules == modules:
        values[known], has[known] = block[name][row[known]], block.has(name)[row[known]]
    else:
        place = {m: i for i, m in enumerate(block.modules)}
        for i, m in enumerate(modules):
            if m in place:
                values[known, i] = block[name][row[known], place[m]]
                has[known, i] = block.has(name)[row[known], place[m]]
    values[~has] = np.nan
    return values, has


def exactly(block: Block, steps: Steps, modules: tuple[str, ...]) -> tuple[Array, Mask]:
    """The one column of ``block`` at just these steps and modules.

    Args:
        block: a block with one name, of any steps and modules.
        steps: ``(step,)`` int64.
        modules: names of the second axis wanted.

    Returns:
        Values (NaN where nothing was recorded) and where there are any, ``(step, module)``.
    """
    values, has = latest(block, steps, modules)
    there = np.isin(steps, block.steps)
    return np.where(there[:, None], values, np.nan), has & there[:, None]


def rolling_max(values: Array, size: int) -> Array:
    """``max(values[i : i + size])`` for every ``i``, along the first axis: ``(step - size + 1, module)``."""
    done = 1
    while 2 * done <= size:
        values = np.maximum(values[:-done], values[done:])
        done *= 2
    rest = size - done
    return np.maximum(values[:-rest], values[rest:]) if rest else values


@dataclass(frozen=True)
class Spikes:
    """Which points stand out; every array is ``(judged step, module)``.

    Attributes:
        mask: True where the point stands out.
        known: True where there were enough points before it to judge.
        count: int64, usable points in the window.
        median: of the window; NaN where the point is not even larger than most of it.
        z: robust standard deviations above the median; NaN likewise, inf where the window has no spread at all.
    """

    mask: Mask
    known: Mask
    count: npt.NDArray[np.int64]
    median: Array
    z: Array


def spikes(x: Array, usable: Mask, start: int, p: Mapping[str, float], floor: float = 0.0) -> Spikes:
    """Points that rise far above the points before them.

    A point stands out if it exceeds the median of its window by ``sigmas`` robust standard deviations, by ``floor``,
    and by ``record`` times what the ``company``-th largest point of the window exceeds it by. The last keeps smooth
    ripples and heavy tails, whose extremes come in company, from standing out.

    Args:
        x: ``(step, module)`` float64; take the logarithm first if only the ratio matters.
        usable: ``(step, module)`` bool, the points that count; non-finite ones never do.
        start: the first row to judge; earlier ones are context.
        p: ``window`` (rows looked back at, not counting the row itself), ``minimum`` (usable points without which
            nothing is judged), ``sigmas``, ``record`` and ``company`` (1, 2 or 3).
        floor: least excess, in units of ``x``.

    Cost: a few maxima per point; two sorts of a window for each point larger than most of its window.
    """
    window, company = int(p["window"]), int(p["company"])
    n, modules = len(x) - start, x.shape[1]
    usable = usable & np.isfinite(x)
    seen = np.zeros((len(x) + 1, modules), dtype=np.int64)
    np.cumsum(usable, axis=0, out=seen[1:])
    rows = np.arange(start, len(x))
    count = seen[rows] - seen[np.maximum(rows - window, 0)]
    known = usable[start:] & (count >= p["minimum"])
    found = Spikes(np.zeros_like(known), known, count, np.full(known.shape, np.nan), np.full(known.shape, np.nan))

    context = min(start, window)
    y = np.full((window + n, modules), -np.inf)
    y[window - context :] = np.where(usable, x, -np.inf)[start - context :]
    # the third largest of a window is at least the smallest of the maxima of its three thirds: almost nothing in a
    # healthy series is larger than that, so almost nothing has to be sorted
    third = window // 3
    highest = rolling_max(y, third)
    ceiling = np.minimum(highest[:n], np.minimum(highest[third:][:n], highest[2 * third :][:n]))
    row, module = np.nonzero(known & (y[window:] > ceiling))
    if not len(row):
        return found
    windows = y[row[:, None] + np.arange(window), module[:, None]]
    value, largest = y[row + window, module], np.partition(windows, -company, axis=1)[:, -company]
    larger = value > largest
    row, module, windows, value, largest = row[larger], module[larger], windows[larger], value[larger], largest[larger]
    # the point stands after its window, and only its baseline is wanted
    series = np.concatenate([windows, value[:, None]], axis=1).T
    base = baseline(series, np.isfinite(series), first=window, window=window, minimum=1)
    median, scale = base.median[-1], base.scale[-1]
    excess = value - median
    found.mask[row, module] = (
        (excess >= floor) & (excess >= p["sigmas"] * scale) & (excess > p["record"] * (largest - median))
    )
    found.median[row, module] = median
    found.z[row, module] = np.where(scale > 0, excess / scale, np.inf)
    return found


def raised(window: Window, steps: Steps, mask: Mask) -> Array:
    """How many times larger a learning rate of the last `RECENT` steps was than any of the `PAST` before them.

    Args:
        window: with ``learning_rate.lr`` and as many points of lookback as both together.
        steps: ``(step,)`` int64.
        mask: ``(step, module)``, where it is asked.

    Returns:
        Of the group where it was most, ``(step, module)``; NaN below 2, where there is nothing to compare with, and in
        rows in which nobody asks.
    """
    block = window["learning_rate.lr"]
    (name,) = block.names
    rates = np.where(block.has(name), block[name], np.nan)
    found = np.full(mask.shape, np.nan)
    for i in np.flatnonzero(mask.any(axis=1)):
        end = int(np.searchsorted(block.steps, steps[i], side="right"))
        middle = max(end - RECENT, 0)
        past, recent = rates[max(middle - PAST, 0) : middle], rates[middle:end]
        if len(past) and len(recent) and rates.shape[1]:
            times = np.fmax.reduce(recent, axis=0) / np.fmax.reduce(past, axis=0)
            most = np.fmax.reduce(np.where(np.isfinite(times), times, np.nan))
            found[i] = most if most >= 2 else np.nan
    return found


def rates(window: Window, steps: Steps, modules: tuple[str, ...]) -> Array:
    """The learning rate of each parameter's group, ``(step, module)``; NaN where it is not known.

    Args:
        window: with ``learning_rate.lr``, and the facts of the run.
        steps: ``(step,)`` int64.
        modules: names of parameters.
    """
    found: dict[str, str] = {}
    for q in window.facts.get("parameters", ()):
        group, optimizer = f"group[{q.get('group')}]", q.get("optimizer")
        found[str(q.get("name"))] = f"optimizer[{optimizer}].{group}" if optimizer else group  # the first has no name
    return latest(window["learning_rate.lr"], steps, tuple(found.get(m, "") for m in modules))[0]


def teaching(window: Window, steps: Steps, modules: tuple[str, ...]) -> Array:
    """What the rows still teach: (1 − accuracy) + (1 − mean largest probability), ``(step, module)``.

    Absent parts count 0, so that a loss on soft targets, which has no accuracy, is judged by its probabilities.
    """
    parts = (latest(window[f"train_accuracy.{c}"], steps, modules)[0] for c in ("accuracy", "top1_mass"))
    return sum((np.nan_to_num(1 - part) for part in parts), start=np.zeros((len(steps), len(modules))))


#: Words for the parts of the data that a script's own names are made of, in the order in which one is preferred.
_HELD_OUT = ("val", "valid", "validation", "dev", "eval", "test")
_TRAIN = ("train", "training")
_QUANTITY = {"accuracy": ("acc", "accuracy"), "loss": ("loss",)}


def logged_as(names: Sequence[str], quantity: Literal["accuracy", "loss"], *, train: bool = False) -> list[str]:
    """The logged names that mean an accuracy or a loss of held-out data (or of training data), the usual one first.

    Args:
        names: as given to ``handle.log``: ``val_acc``, ``test/accuracy``, ``eval_loss``, ``ValidationAcc``, …
        quantity: which of the two.
        train: of the training data instead.

    Returns:
        Those of ``names`` in which a word for the data and one for the quantity occur.
    """
    parts = _TRAIN if train else _HELD_OUT
    found = []
    for name in names:
        words = [w.lower() for w in re.findall(r"[A-Z]*[a-z]+|[A-Z]+", name)]
        part = next((i for i, p in enumerate(parts) if p in words), None)
        if part is not None and any(q in words for q in _QUANTITY[quantity]):
            found.append((part, name))
    return [name for _, name in sorted(found, key=lambda x: x[0])]


def filled(block: Block, module: str, back: int) -> Array:
    """One module's values ``(step,)``, gaps filled with the last one of at most ``back`` rows before; NaN without."""
    (name,) = block.names
    at = block.modules.index(module)
    rows = np.arange(len(block.steps))
    last = np.maximum.accumulate(np.where(block.has(name)[:, at], rows, -1))
    return np.where((last >= 0) & (rows - last <= back), block[name][np.maximum(last, 0), at], np.nan)


def pooled(values: Array, weights: Array, wanted: float, most: int) -> Array:
    """Means of shares over rows: of each point and as many before it as it takes for ``wanted`` rows, at most ``most``.

    Args:
        values: ``(step,)`` shares of a batch; NaN where there are none.
        weights: ``(step,)`` rows each was taken over.
        wanted: rows that are enough.
        most: points that are looked at, including the one itself.

    Returns:
        ``(step,)``; NaN where the point itself is.
    """
    has = np.isfinite(values) & np.isfinite(weights) & (weights > 0)
    size = np.rint(np.where(has, weights, 0.0))
    right = np.rint(np.where(has, values * size, 0.0))  # whole numbers: exact wherever the sums begin
    total, good = (np.cumsum(np.pad(a, (1, 0))) for a in (size, right))
    back = np.clip(np.ceil(wanted / np.maximum(size, 1)), 1, most).astype(np.int64)
    end = np.arange(1, len(values) + 1)
    begin = np.maximum(end - back, 0)
    with np.errstate(invalid="ignore"):
        return np.where(has, (good[end] - good[begin]) / (total[end] - total[begin]), np.nan)


#: Columns that `accuracies` reads, and the recorded points before the judged ones that it looks back at.
ACCURACIES = ("logged.value", "train_accuracy.accuracy", "train_accuracy.rows")
POOL, POOLED_ROWS = 32, 512


def accuracies(window: Window) -> tuple[Steps, tuple[str, ...], Array, Array]:
    """Training and held-out accuracy wherever the script logged one of the latter.

    The training accuracy is the logged one if there is one (`filled`), else that of the batches (`pooled`).

    Returns:
        Steps ``(step,)``, names of the held-out accuracies, training accuracy ``(step, name)``, held-out accuracy
        ``(step, name)`` with NaN where it was not logged. No names if none is logged, or no training accuracy is known.
    """
    logged, seen = window["logged.value"], window["train_accuracy.accuracy"]
    names = tuple(logged_as(logged.modules, "accuracy"))
    own = logged_as(logged.modules, "accuracy", train=True)
    if not names:
        train = np.full(len(logged.steps), np.nan)
    elif own:
        train = filled(logged, own[0], POOL)
    elif seen.modules:
        first = seen.modules[:1]
        rows, _ = latest(window["train_accuracy.rows"], seen.steps, first)
        values = np.where(seen.has(seen.names[0])[:, 0], seen[seen.names[0]][:, 0], np.nan)
        shares = Block(seen.steps, first, {"share": pooled(values, rows[:, 0], POOLED_ROWS, POOL)[:, None]})
        train = latest(shares, logged.steps, first)[0][:, 0]
    else:
        names, train = (), np.full(len(logged.steps), np.nan)
    at = [logged.modules.index(name) for name in names]
    held = np.where(logged.has("logged.value")[:, at], logged["logged.value"][:, at], np.nan)
    return logged.steps, names, np.broadcast_to(train[:, None], held.shape), held
