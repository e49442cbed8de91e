"""Several runs side by side: what differs between them, where two part, and what a sweep says.

**Where two runs part.** All series that both recorded are laid over each other at their common steps. Two answers:

- *Identical until*: the last step up to which every common value is the same bit for bit, and the series that differ at
  the next one in the order in which a step reaches them. It needs no threshold, and of two runs with one seed it names
  the cause: what differs first cannot be a consequence. Durations are left out, which no two runs share.
- *Outside the band*: where the second run leaves the noise band of the first and stays out. The first run's series is
  cut into blocks of `BLOCK` points. The band at a point reaches from the lowest to the highest value of its block and
  the `REACH` blocks on either side, one in `TRIM` left out at both ends of each as wild, and `WIDTH` robust scales of
  the block (1.4826 MAD, at least 2^-9 of the median) beyond: a trend, or being some steps ahead, is no difference. What
  is drawn on a logarithmic scale and is positive throughout gets its band there. A series parts at the first point
  outside from which on at least `PART` of `HOLD` points are outside, or at once where the second run has a NaN or
  infinity and the first has none anywhere. What is outside within the first `HOLD` points was different from the start,
  and is told apart.

Calibration of the band, on 8 kinds of healthy training (MLP, CNN, LSTM, GRU, transformer, auto-encoder, residual
network, mixture of experts), 4 seeds each. With one seed no bit differs in any series. The 96 pairs with two seeds
differ from the start, all of them; later, 31 of 12,300 series part (in 18 pairs of 84) without the mixture of
experts, and 138 of its 3,144: which of its experts die is a matter of the seed. The loss never does.

**A sweep.** `sensitivity` and `extrapolation` follow Wortsman et al. (2023), Small-scale proxies for large-scale
Transformer training instabilities, arXiv 2309.14322: sec. 3 (learning-rate sensitivity) and sec. 4 (predicting the
attention logits of a larger model; we take both axes as logarithms).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from monitor.diagnosis.text import number
from monitor.metric import SITES, Array, Block, Mask, Metric, load_metrics
from monitor.robust import FLOOR, SIGMA_PER_MAD

if TYPE_CHECKING:
    from monitor.store.run import Run

#: Points of a block, blocks on either side that a band takes in, and half its width in robust scales.
BLOCK, REACH, WIDTH = 20, 2, 4.0
#: One in so many points of a block, on either side, is wild and does not widen the band.
TRIM = 8
#: A series has parted if this part of so many points is outside the band.
HOLD, PART = 20, 0.75
#: What a later parting of runs that differ from the start is worth.
CALIBRATION = "two seeds alone part 1 series in 400"
#: Runs that are laid over the first one unless told otherwise; each is read whole.
PAIRS = 7
#: Last part of a run whose losses make its final loss.
TAIL = 0.05
#: Largest attention logit of a training that goes well; every run above it diverged (arXiv 2309.14322 sec. 3).
LOGIT_LIMIT = 1e4
#: How far into a run attention logits are compared: the paper's step 2,000 of 100,000.
EARLY = 0.02
#: Distinct learning rates, or sizes, without which a sweep says nothing.
LEAST = 3
#: Sizes must span this factor: a parabola through nearly equal sizes says nothing about one ten times as large.
SPAN = 4.0

_VALUES = 2_000_000  # laid over each other at a time
_FEWEST = 5  # points of a block that make a median and a scale
_HELD_OUT = ("val", "eval", "test")
_GAP = 16  # characters of an argument that stand for a long one's

Level = Literal["healthy", "info", "warning", "critical", "not_enough_evidence"]


@dataclass(frozen=True)
class Row:
    """One run in the table.

    Attributes:
        path: its folder.
        name: shortest name that tells it from the others.
        status: as `Run.status`.
        steps: recorded steps.
        first_step, last_step: the first and the last of them, None if there is none.
        loss: last recorded loss, NaN if it is not finite or there is none; ``nonfinite`` counts those that are not.
        nonfinite: losses that were NaN or infinite.
        logged: the last value of everything the script logged.
        rate: peak learning rate, None if it is not known.
        parameters: number of scalars in the model, 0 if it is not known.
        level, text: of the verdict.
        onset: step at which the verdict's worst incident begins, None if there is none or it has no step.
        head: title of that incident, "" if there is none.
    """

    path: Path
    name: str
    status: str
    steps: int
    first_step: int | None
    last_step: int | None
    loss: float | None
    nonfinite: int
    logged: dict[str, float]
    rate: float | None
    parameters: int
    level: Level
    text: str
    onset: int | None
    head: str


@dataclass(frozen=True)
class Difference:
    """A series at the first step at which two runs are not the same: ``reference`` is the first run's value."""

    ref: str
    module: str
    site: str
    step: int
    reference: float
    value: float


@dataclass(frozen=True)
class Departure(Difference):
    """A series at the step at which the second run leaves the first one's band from ``low`` to ``high``."""

    low: float
    high: float


@dataclass(frozen=True)
class Parting:
    """A run laid over the first one.

    Attributes:
        run: its place among the runs.
        series: series that both recorded at common steps; 0: there is nothing to compare.
        judged: of these, those with points enough for a band.
        first_step, last_step: of the common steps, None if there are none.
        identical_until: last common step up to which everything is the same, None if not even the first is.
        first: the series that differ at the next step, in the order in which a step reaches them; none if nothing does.
        start: the series that are outside the band from the start.
        later: those that leave it later, the earliest first.
    """

    run: int
    series: int
    judged: int
    first_step: int | None
    last_step: int | None
    identical_until: int | None
    first: tuple[Difference, ...]
    start: tuple[Departure, ...]
    later: tuple[Departure, ...]


@dataclass(frozen=True)
class Sensitivity:
    """How much the final loss depends on the learning rate, in models of one size.

    Attributes:
        parameters: of the models.
        rates: distinct peak learning rates, ascending.
        losses: final loss at each, at most the initial one; the mean where several runs share a rate.
        value: mean distance of these from the best, in units of the loss; 0: the learning rate does not matter.
        best: rate with the lowest final loss.
    """

    parameters: int
    rates: tuple[float, ...]
    losses: tuple[float, ...]
    value: float
    best: float


@dataclass(frozen=True)
class Extrapolation:
    """The largest attention logit of the first block, at one learning rate and an early step, carried on to a new size.

    Attributes:
        rate: peak learning rate.
        step: at which the logits are compared.
        parameters: distinct sizes, ascending.
        logits: the largest attention logit of the first block at each (a bound of it where that is what was recorded).
        size: ten times the largest size.
        predicted: logit there; NaN if the sizes are too much alike, or a logit is not positive.
        beyond: True if that is above `LOGIT_LIMIT`.
    """

    rate: float
    step: int
    parameters: tuple[int, ...]
    logits: tuple[float, ...]
    size: int
    predicted: float
    beyond: bool


@dataclass(frozen=True)
class Comparison:
    """Runs side by side; the first is what the others are compared with.

    Attributes:
        rows: the runs.
        differs: fact -> its text in each run ("" where it is not known), of those that are not equal.
        partings: one per run that was laid over the first.
        sensitivity: one per size with `LEAST` learning rates.
        extrapolation: one per learning rate with `LEAST` sizes.
    """

    rows: tuple[Row, ...]
    differs: dict[str, tuple[str, ...]]
    partings: tuple[Parting, ...]
    sensitivity: tuple[Sensitivity, ...]
    extrapolation: tuple[Extrapolation, ...]


def compare(runs: Sequence[Run], pairs: int = PAIRS) -> Comparison:
    """Lay runs side by side.

    Args:
        runs: opened runs, the reference first.
        pairs: how many of the others are laid over it, in their order.

    Cost: for the partings, one read of every common series of each run: 1.2 s of CPU time for two runs of 900 series
    over 10,000 steps.
    """
    rows = tuple(_row(run, name) for run, name in zip(runs, names([r.path for r in runs]), strict=True))
    others = range(1, min(len(runs), pairs + 1))
    return Comparison(
        rows,
        _differs(runs, rows),
        tuple(parting(runs[0], runs[i], i) for i in others),
        tuple(_sensitivities(runs, rows)),
        tuple(_extrapolations(runs, rows)),
    )


def names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of ``paths``, in whole folders, that are all different (equal paths stay equal)."""
    depth = dict.fromkeys(paths, 1)
    while True:
        shown = {p: "/".join(p.parts[-d:]) for p, d in depth.items()}
        counted = Counter(shown.values())
        alike = [p for p in depth if counted[shown[p]] > 1 and depth[p] < len(p.parts)]
        if not alike:
            return [shown[p] for p in paths]
        for p in alike:
            depth[p] += 1


# ---------------------------------------------------------------------- the table


def logged_in(rows: Sequence[Row], part: float) -> list[str]:
    """What at least ``part`` of the scripts logged: what was measured on held-out data first, then the most common."""
    counted = Counter(m for row in rows for m in row.logged)
    several = sorted(counted, key=lambda m: (not m.lower().startswith(_HELD_OUT), -counted[m]))
    return [m for m in several if counted[m] >= part * len(rows)]


def _row(run: Run, name: str) -> Row:
    verdict = run.verdict()
    worst = verdict.incidents[0].head if verdict.incidents else None
    loss = next(iter(run.summary("loss.value")), None)
    last = None if loss is None else loss.last
    timed = worst is not None and not _about_facts(worst.rule)
    return Row(
        path=run.path,
        name=name,
        status=run.status,
        steps=run.steps,
        first_step=run.first_step,
        last_step=run.last_step,
        loss=last,
        nonfinite=loss.nonfinite if loss is not None else 0,
        logged={s.module: s.last for s in run.summary("logged.value")},
        rate=_rate(run),
        parameters=sum(n for p in run.facts.get("parameters", ()) if isinstance(n := p.get("numel"), int)),
        level=verdict.level,
        text=verdict.text,
        onset=worst.first_step if worst is not None and timed else None,
        head=worst.title if worst is not None else "",
    )


def _about_facts(rule: str) -> bool:
    from monitor.rule import load_rules

    known = load_rules().get(rule)
    return known is not None and known.audit is not None


def _rate(run: Run) -> float | None:
    """Peak learning rate: the largest recorded, or else the largest that an optimizer was made with."""
    peaks = [s.max for s in run.summary("learning_rate.lr") if math.isfinite(s.max)]
    if not peaks:
        peaks = [float(g["lr"]) for g in _groups(run.facts) if isinstance(g.get("lr"), int | float)]
    return float(f"{max(peaks):.6g}") if peaks else None  # a float32 of 1e-3 is not 1e-3


# ---------------------------------------------------------------------- what differs


def _differs(runs: Sequence[Run], rows: Sequence[Row]) -> dict[str, tuple[str, ...]]:
    """The facts that are not the same in all runs."""
    told = [_told(run, row) for run, row in zip(runs, rows, strict=True)]
    if all("arguments" in t for t in told):
        common = set.intersection(*(set(_arguments(run)) for run in runs))
        for t, run in zip(told, runs, strict=True):
            t["arguments"] = " ".join(a for a in _arguments(run) if a not in common)
    keys = dict.fromkeys(k for t in told for k in t)
    found = {k: tuple(t.get(k, "") for t in told) for k in keys}
    if found.get("lr") == found.get("peak lr"):
        found.pop("lr", None)
    return {k: texts for k, texts in found.items() if len(set(texts)) > 1}


def _told(run: Run, row: Row) -> dict[str, str]:
    """Everything known about a run without tensors, as texts."""
    facts = run.facts
    told = {"model": str(facts.get("class", ""))}
    if row.parameters:
        told["parameters"] = f"{row.parameters:,}"
    classes = Counter(str(m.get("class", "?")) for m in facts.get("modules", ())[1:])
    told |= {f"{name} modules": str(n) for name, n in classes.items()}
    dtypes = dict.fromkeys(str(p.get("dtype", "")) for p in facts.get("parameters", ()))
    told["dtype"] = ", ".join(dtypes)
    told["optimizer"] = ", ".join(str(o.get("class", "?")) for o in facts.get("optimizers", ()))
    if row.rate is not None:
        told["peak lr"] = f"{row.rate:g}"
    options = dict.fromkeys(k for g in _groups(facts) for k in g if k not in ("parameters", "params"))
    for key in options:
        values = dict.fromkeys(_text(g.get(key)) for g in _groups(facts))
        told[f"{key}"] = ", ".join(values)
    rest = {k: v for k, v in facts.items() if k not in ("class", "modules", "parameters", "optimizers", "argv")}
    told |= dict(_leaves("", rest))
    told["script"] = str(run.info["script"])
    if _arguments(run):
        told["arguments"] = " ".join(_arguments(run))
    return told | {f"{k} version": _text(v) for k, v in run.info["versions"].items()}


def _groups(facts: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The parameter groups of all optimizers; run.json may come from anywhere."""
    several = [o.get("groups") for o in facts.get("optimizers", ())]
    return [g for groups in several if isinstance(groups, list) for g in groups if isinstance(g, dict)]


def _arguments(run: Run) -> list[str]:
    """The script's arguments, an option together with its value."""
    argv = run.facts.get("argv")
    found: list[str] = []
    waiting = False
    for word in map(str, argv[1:]) if isinstance(argv, list) else ():
        if waiting and not word.startswith("-"):
            found[-1] += f" {word}"
            waiting = False
        else:
            found.append(word)
            waiting = word.startswith("-") and "=" not in word
    return found


def _leaves(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for k, v in value.items():
            yield from _leaves(f"{prefix}{' ' if prefix else ''}{k}", v)
    else:
        yield prefix, _text(value)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return f"({', '.join(_text(v) for v in value[:_GAP])}{', …' if len(value) > _GAP else ''})"
    return str(value)


# ---------------------------------------------------------------------- where two runs part


def parting(a: Run, b: Run, place: int = 1) -> Parting:
    """Lay run ``b`` over run ``a``.

    Args:
        a: the reference.
        b: another run.
        place: what is answered as ``run``.

    Later attempts replace the steps of earlier ones, as everywhere.
    """
    order: dict[tuple[str, str], tuple[int, int]] = {}
    first: list[Difference] = []
    left: list[tuple[int, Departure]] = []
    steps: list[npt.NDArray[np.int64]] = []
    series = judged = 0
    for ref, metric, unit in _shared(a, b):
        site = metric.site
        in_b = set(b.modules(ref))
        modules = [m for m in a.modules(ref) if m in in_b]
        for some in _portions(modules, max(a.steps, b.steps)):
            at, (x, has_x), (y, has_y) = _over(a.block(ref, some), b.block(ref, some), ref)
            both = has_x & has_y
            recorded = both.any(axis=1)
            series += int(np.count_nonzero(recorded))
            if not recorded.any():
                continue
            steps.append(at)
            for m in some:
                order[ref, m] = SITES.index(site), len(order)
            for i, row in enumerate(_first_true(both & (x != y) & ~(np.isnan(x) & np.isnan(y)))):
                if row >= 0:
                    first.append(Difference(ref, some[i], site, int(at[row]), float(x[i, row]), float(y[i, row])))
            if unit == "hash":
                continue
            judged += int(np.count_nonzero(both.sum(axis=1) >= HOLD))
            low, high = band(x, has_x, log=metric.plot.log)
            for i, row in enumerate(departures(x, has_x, y, has_y, low, high)):
                if row >= 0:
                    numbers = (float(v[i, row]) for v in (x, y, low, high))
                    left.append((row, Departure(ref, some[i], site, int(at[row]), *numbers)))

    def key(d: Difference) -> tuple[int, int, int]:
        return d.step, *order[d.ref, d.module]

    common = np.unique(np.concatenate([np.zeros(0, np.int64), *steps]))
    begin = min((d.step for d in first), default=None)
    same = common if begin is None else common[common < begin]
    left.sort(key=lambda found: key(found[1]))
    return Parting(
        run=place,
        series=series,
        judged=judged,
        first_step=int(common[0]) if len(common) else None,
        last_step=int(common[-1]) if len(common) else None,
        identical_until=int(same[-1]) if len(same) else None,
        first=tuple(sorted((d for d in first if d.step == begin), key=key)),
        start=tuple(d for row, d in left if row < HOLD),
        later=tuple(d for row, d in left if row >= HOLD),
    )


def first_of_each(several: Sequence[Difference]) -> list[Difference]:
    """The first series of each metric, in their order."""
    found: dict[str, Difference] = {}
    for d in several:
        found.setdefault(d.ref.partition(".")[0], d)
    return list(found.values())


def apart(d: Difference) -> str:
    """How far apart two runs are in a series, in words."""
    if isinstance(d, Departure) and not math.isnan(d.low):
        return f"{number(d.value)}, band {number(d.low)} to {number(d.high)}"
    return f"{number(d.value)} against {number(d.reference)}"


def same(p: Parting) -> str:
    """Up to where a run is the same as the first one, in words."""
    if not p.series:
        return "no series at common steps: nothing to lay over each other"
    span = f"steps {p.first_step:,} to {p.last_step:,}" if p.first_step != p.last_step else f"step {p.first_step:,}"
    if not p.first:
        return f"identical in all {p.series:,} series, {span}"
    if p.identical_until is None:
        return f"different from the start ({p.series:,} series, {span})"
    return f"identical until step {p.identical_until:,} ({p.series:,} series, {span})"


def stays(p: Parting) -> str:
    """Why no series of a run that is not the same leaves the band of the first one later on, in words."""
    judged = p.judged - len(p.start)
    if not judged:
        return f"fewer than {HOLD} common points: too few for a noise band"
    return f"none of {judged:,} series leaves the noise band later, for {HOLD} points"


def noise_band(run: Run, ref: str, module: str) -> tuple[npt.NDArray[np.int64], Array, Array]:
    """Steps, lower and upper edge of the `band` of one series over all its steps, ``(step,)`` each.

    Nothing, if it has fewer points than are judged.
    """
    block = run.block(ref, [module])
    values, has = block[ref].T, block.has(ref).T
    if np.count_nonzero(has) < HOLD:
        return np.zeros(0, np.int64), np.zeros(0), np.zeros(0)
    low, high = band(values, has, log=load_metrics()[ref.partition(".")[0]].plot.log)
    return block.steps, low[0], high[0]


def _shared(a: Run, b: Run) -> Iterator[tuple[str, Metric, str]]:
    """``(ref, metric, unit)`` of every column that both recorded and that is not a duration."""
    known = load_metrics()
    in_b = b.metrics()
    for metric, columns in a.metrics().items():
        m = known.get(metric)
        for column in columns:
            if m is None or column not in in_b.get(metric, ()) or all(c.name != column for c in m.columns):
                continue
            unit = m.column(column).unit
            if unit != "s":
                yield f"{metric}.{column}", m, unit


def _portions(modules: Sequence[str], steps: int) -> Iterator[list[str]]:
    """``modules`` so many at a time that their values fit the memory."""
    many = max(_VALUES // max(steps, 1), 1)
    for i in range(0, len(modules), many):
        yield list(modules[i : i + many])


def _over(a: Block, b: Block, ref: str) -> tuple[npt.NDArray[np.int64], tuple[Array, Mask], tuple[Array, Mask]]:
    """Two blocks at their common steps: the steps, then values and where there are any as ``(module, step)``."""
    steps, i, j = np.intersect1d(a.steps, b.steps, assume_unique=True, return_indices=True)
    several = [
        (np.ascontiguousarray(q[ref][rows].T), np.ascontiguousarray(q.has(ref)[rows].T)) for q, rows in ((a, i), (b, j))
    ]
    return steps, several[0], several[1]


def band(values: Array, has: Mask, log: bool = False) -> tuple[Array, Array]:
    """The noise band of series: what their own neighbourhood makes plausible at each point.

    Args:
        values: ``(series, step)`` float64, of at least one step.
        has: ``(series, step)`` bool, True where a value was recorded; non-finite ones are left out.
        log: those that are positive throughout get their band on a logarithmic scale.

    Returns:
        ``low`` and ``high``, ``(series, step)``; where fewer than 5 values of a block were recorded, those of the
        neighbours; NaN where there are none.
    """
    usable = has & np.isfinite(values)
    positive = np.full(len(values), log) & ((values > 0) | ~usable).all(axis=1)
    x = values.copy()
    with np.errstate(divide="ignore", invalid="ignore"):
        x[positive] = np.log(values[positive])
    low, high = _edges(x, usable, positive)
    for edge in (low, high):
        edge[positive] = np.exp(edge[positive])
    own = np.where(usable, values, np.nan)  # a run is never outside its own band
    return np.fmin(low, own), np.fmax(high, own)


def _edges(values: Array, usable: Mask, logarithms: Mask) -> tuple[Array, Array]:
    """`band` of values on their own scale; ``logarithms`` ``(series,)`` says which are logarithms."""
    count, n = values.shape
    blocks = max(n // BLOCK, 1)
    size = BLOCK if n >= BLOCK else n
    with np.errstate(over="ignore"):
        x = values[:, : blocks * size].astype(np.float32).reshape(count, blocks, size)
    inside = usable[:, : blocks * size].reshape(x.shape)
    number = inside.sum(axis=2)
    ranked = np.sort(np.where(inside, x, np.float32(np.inf)), axis=-1)
    middle = _median(ranked, number)
    with np.errstate(invalid="ignore", over="ignore"):
        away = np.where(inside, np.abs(x - middle[..., None].astype(np.float32)), np.float32(np.inf))
        scale = SIGMA_PER_MAD * _median(np.sort(away, axis=-1), number)
        # the logarithm of 1 + a part is that part
        scale = WIDTH * np.maximum(scale, FLOOR * np.where(logarithms[:, None], 1.0, np.abs(middle)))
        low = _ranked(ranked, number // TRIM) - scale
        high = _ranked(ranked, number - 1 - number // TRIM) + scale
    for edge in (low, high):
        edge[number < _FEWEST] = np.nan
    block_of = np.minimum(np.arange(n) // size, blocks - 1)
    return _hull(low, np.fmin)[:, block_of], _hull(high, np.fmax)[:, block_of]


def _median(ranked: npt.NDArray[np.float32], number: npt.NDArray[np.int64]) -> Array:
    """Median of the first ``number`` values of the last axis, which is sorted."""
    return 0.5 * (_ranked(ranked, (number - 1) // 2) + _ranked(ranked, number // 2))


def _ranked(ranked: npt.NDArray[np.float32], place: npt.NDArray[np.int64]) -> Array:
    """The value at a place of the last axis; any value where there is no such place."""
    inside = np.clip(place, 0, ranked.shape[-1] - 1)
    return np.take_along_axis(ranked, inside[..., None], axis=-1)[..., 0].astype(np.float64)


def _hull(edge: Array, extreme: Callable[[Array, Array], Array]) -> Array:
    """The extreme over each block and `REACH` blocks on either side."""
    found = edge.copy()
    for k in range(1, min(REACH, edge.shape[1] - 1) + 1):
        found[:, k:] = extreme(found[:, k:], edge[:, :-k])
        found[:, :-k] = extreme(found[:, :-k], edge[:, k:])
    return found


def departures(x: Array, has_x: Mask, y: Array, has_y: Mask, low: Array, high: Array) -> npt.NDArray[np.int64]:
    """Row at which each series leaves the band of its reference for good enough, -1 if it does not.

    Args:
        x: the reference, ``(series, step)``.
        has_x: where it was recorded.
        y: the other run.
        has_y: where it was recorded.
        low: lower edge of the band of ``x``.
        high: its upper edge.

    Returns:
        ``(series,)`` int64.
    """
    both = has_x & has_y
    outside = both & ((y < low) | (y > high))
    n = x.shape[1]
    found = np.full(len(x), -1, dtype=np.int64)
    if n >= HOLD:
        wide = np.zeros((len(x), n + 1), dtype=np.int32)
        np.cumsum(outside, axis=1, out=wide[:, 1:])
        found = _first_true(((wide[:, HOLD:] - wide[:, :-HOLD]) >= PART * HOLD) & outside[:, : n - HOLD + 1])
    unsound = (has_x & ~np.isfinite(x)).any(axis=1, keepdims=True)
    broken = _first_true(both & ~np.isfinite(y) & ~unsound)
    return np.where(broken < 0, found, np.where(found < 0, broken, np.minimum(found, broken)))


def _first_true(mask: Mask) -> npt.NDArray[np.int64]:
    """The first True of each row, -1 if there is none."""
    if not mask.shape[1]:
        return np.full(len(mask), -1, dtype=np.int64)
    return np.where(mask.any(axis=1), mask.argmax(axis=1), -1)


# ---------------------------------------------------------------------- sweeps


def sensitivity(final: Sequence[float], initial: Sequence[float]) -> float:
    """Learning-rate sensitivity: mean over the grid of ``min(l(eta), l0)`` minus the least, in units of the loss.

    Args:
        final: final loss at each learning rate; one that is NaN or infinite counts as the initial one.
        initial: loss before training, for each.

    Source: arXiv 2309.14322 sec. 2.2.
    """
    return float(np.mean(clipped(final, initial)) - np.min(clipped(final, initial)))


def clipped(final: Sequence[float], initial: Sequence[float]) -> Array:
    """Final losses that are at most the initial ones."""
    end, begin = np.asarray(final, dtype=np.float64), np.asarray(initial, dtype=np.float64)
    return np.where(np.isfinite(end), np.minimum(end, begin), begin)


def extrapolate(parameters: Sequence[float], logits: Sequence[float], size: float) -> float:
    """Attention logit of a model of ``size`` parameters: the parabola of log10 logit over log10 parameters.

    Args:
        parameters: at least three different sizes; exact for three, least squares for more.
        logits: positive, at each.
        size: where it is wanted.

    Source: arXiv 2309.14322 sec. 4, a quadratic; that both axes are logarithms is our reading.
    """
    x, y = np.log10(np.asarray(parameters, dtype=np.float64)), np.log10(np.asarray(logits, dtype=np.float64))
    # centred and scaled: powers of 9 next to powers of 6 lose digits
    middle, scale = x.mean(), np.ptp(x)
    a, b, c = map(float, np.polyfit((x - middle) / scale, y, 2))
    at = (math.log10(size) - float(middle)) / float(scale)
    return 10 ** (a * at * at + b * at + c)


def _sensitivities(runs: Sequence[Run], rows: Sequence[Row]) -> Iterator[Sensitivity]:
    for size, members in _grouped(rows, lambda r: r.parameters):
        if len({rows[i].rate for i in members}) < LEAST:
            continue
        ends = {i: found for i in members if (found := _ends(runs[i])) is not None}
        by_rate: dict[float, list[float]] = {}
        for i, (first, last) in ends.items():
            rate = rows[i].rate
            assert rate is not None
            by_rate.setdefault(rate, []).append(float(clipped([last], [first])[0]))
        if len(by_rate) >= LEAST:
            rates = sorted(by_rate)
            losses = [float(np.mean(by_rate[r])) for r in rates]
            value, best = sensitivity(losses, losses), rates[int(np.argmin(losses))]
            yield Sensitivity(int(size), tuple(rates), tuple(losses), value, best)


def _ends(run: Run) -> tuple[float, float] | None:
    """First loss, and the median of the last `TAIL` of the steps (not finite if most of them are not)."""
    modules = run.modules("loss.value")
    if not modules:
        return None
    steps, values = run.series("loss.value", modules[0])
    if not len(steps) or not math.isfinite(values[0]):
        return None
    tail = values[steps > steps[-1] - TAIL * (steps[-1] - steps[0] + 1)]
    tail = np.sort(np.where(np.isnan(tail), np.inf, tail))
    return float(values[0]), float(tail[len(tail) // 2])


def _extrapolations(runs: Sequence[Run], rows: Sequence[Row]) -> Iterator[Extrapolation]:
    for rate, members in _grouped(rows, lambda r: r.rate):
        if len({rows[i].parameters for i in members}) < LEAST:
            continue
        early = int(EARLY * min(rows[i].last_step or 0 for i in members))
        by_size: dict[int, list[float]] = {}
        for i in members:
            logit = _early_logit(runs[i], early)
            if logit is not None:
                by_size.setdefault(rows[i].parameters, []).append(logit)
        if len(by_size) < LEAST:
            continue
        sizes = sorted(by_size)
        logits = [float(np.median(by_size[s])) for s in sizes]
        usable = all(math.isfinite(v) and v > 0 for v in logits) and sizes[-1] >= SPAN * sizes[0]
        predicted = extrapolate(sizes, logits, 10 * sizes[-1]) if usable else math.nan
        beyond = predicted > LOGIT_LIMIT * (1 + 1e-9)  # rounding is no excess
        yield Extrapolation(rate, early, tuple(sizes), tuple(logits), 10 * sizes[-1], predicted, beyond)


def _early_logit(run: Run, step: int) -> float | None:
    """Largest attention logit of the first block, as it was last recorded at or before ``step``."""
    for ref in ("attn_logit_max.lse_max", "attn_logit_max.found"):
        modules = run.modules(ref)
        if modules:
            first = modules[0].partition("[")[0]
            block = run.block(ref, [m for m in modules if m.partition("[")[0] == first], last=step)
            has = block.has(ref).any(axis=1)
            if has.any():
                return float(np.nanmax(block[ref][has][-1]))
    return None


def _grouped(rows: Sequence[Row], of: Callable[[Row], float | None]) -> list[tuple[float, list[int]]]:
    """Places of the rows that share a number, in its order; rows without one are in no group."""
    found: dict[float, list[int]] = {}
    for i, row in enumerate(rows):
        if number := of(row):
            found.setdefault(number, []).append(i)
    return sorted(found.items())
