"""What a sweep over learning rates or sizes says.

`sensitivity` and `extrapolation` follow Wortsman et al. (2023), Small-scale proxies for large-scale Transformer
training instabilities, arXiv 2309.14322: sec. 3 (learning-rate sensitivity) and sec. 4 (predicting the attention logits
of a larger model; we take both axes as logarithms).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from monitor.metric import Array

if TYPE_CHECKING:
    from monitor.diagnosis.comparison.table import Row
    from monitor.store.run import Run

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


def sensitivities(runs: Sequence[Run], rows: Sequence[Row]) -> Iterator[Sensitivity]:
    """Of each size with `LEAST` learning rates."""
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


def extrapolations(runs: Sequence[Run], rows: Sequence[Row]) -> Iterator[Extrapolation]:
    """Of each learning rate with `LEAST` sizes."""
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
