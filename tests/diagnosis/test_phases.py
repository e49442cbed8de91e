"""Memorised when, generalised when: the marks, the labels and the timeline."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import monitor
from monitor.diagnosis.phases import Phases, judge, log_distance, log_time, phases
from monitor.store.writer import RunWriter
from tests.rules.series import column

SAMPLES = Path(__file__).parents[2] / "sample_runs"


def judged(train: list[float], test: list[float], every: int = 100, losses: bool = False) -> Phases:
    steps = np.arange(len(train), dtype=np.int64) * every
    return judge((steps, np.array(train)), (steps, np.array(test)), losses=losses)


def spans(found: Phases) -> list[tuple[str, int, int]]:
    return [(p.name, p.first, p.last) for p in found.timeline]


def test_marks() -> None:
    """Oracle: closed form. Evaluations every 100 steps: memorised at 100, generalised at 400, ratio 4."""
    found = judged([0.2, 1, 1, 1, 1, 1, 1], [0.1, 0.1, 0.1, 0.1, 0.99, 1, 1])
    assert (found.memorised, found.generalised, found.ratio, found.label) == (100, 400, 4, "delayed")
    assert found.gap == 0
    assert spans(found) == [("learning", 0, 99), ("memorised", 100, 399), ("generalised", 400, 600)]


@pytest.mark.parametrize(
    ("low", "label"), [(2, "normal"), (30, "delayed"), (31, "grokking"), (1000, "memorised")], ids=str
)
def test_labels(low: int, label: str) -> None:
    """Oracle: closed form. Memorised at evaluation 3; the held-out accuracy stays at 0.1 for ``low`` evaluations."""
    train, test = [0.1] * 3 + [1.0] * 197, ([0.1] * low + [1.0] * 200)[:200]
    found = judged(train, test, every=1)
    assert found.label == label
    assert found.memorised == 3
    assert found.generalised == (low if low < 200 else None)


@pytest.mark.parametrize(("held_out", "label"), [(0.7, "normal"), (0.68, "grokking")])
def test_a_creep_is_no_delay(held_out: float, label: str) -> None:
    """Oracle: closed form. Memorised at 1, generalised at 40; between, 0.99 - 0.3 = 0.69 decides."""
    found = judged([0.1] + [1.0] * 50, [0.1] + [held_out] * 39 + [0.99] * 11, every=1)
    assert (found.memorised, found.generalised, found.ratio, found.label) == (1, 40, 40, label)


def test_a_slow_rise_is_a_phase_of_its_own() -> None:
    """Oracle: closed form. A tenth of the way from 0 to 0.99 is passed at 0.099: the tenth point of a slope of 0.01."""
    found = judged([1.0] * 160, [0.0] * 50 + [0.01 * i for i in range(1, 101)] + [1.0] * 10, every=1)
    assert spans(found) == [("memorised", 0, 58), ("generalising", 59, 147), ("generalised", 148, 159)]


def test_held_means_three() -> None:
    """Oracle: planted fault. Two good evaluations, or good ones with a NaN between, are not yet learned."""
    nan = float("nan")
    found = judged([1, 1, 0.5, 1, nan, 1, 1, 1], [0.0] * 8)
    assert found.memorised == 500
    assert judged([0.9, 1, 1], [0.0] * 3).memorised is None
    assert judged([0.9, 1, 1], [0.0] * 3).label == "undecided"


def test_losses() -> None:
    """Oracle: closed form. 1 % of the first loss is learned."""
    found = judged([4, 0.05, 0.04, 0.03, 0.02, 0.01], [4, 5, 5, 5, 5, 5], losses=True)
    assert (found.memorised, found.generalised, found.label) == (200, None, "memorised")
    assert found.gap == pytest.approx(4.99)


@pytest.mark.parametrize("first", [-2.0, 0.0, float("inf"), float("nan")])
def test_losses_without_a_size(first: float) -> None:
    """Oracle: definition. Of a first loss that is not a positive number, a hundredth means nothing."""
    assert judged([first, -3, -4, -5, -6], [first, 0, 0, 0, 0], losses=True).memorised is None


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_a_timeline_covers_the_run_without_overlap(train: list[float], test: list[float]) -> None:
    """Oracle: invariance. Whatever the accuracies: phases follow one another from the first step to the last."""
    n = min(len(train), len(test))
    found = spans(judged(train[:n], test[:n], every=10))
    assert found[0][1] == 0
    assert found[-1][2] == 10 * (n - 1)
    assert all(a[2] + 1 == b[1] for a, b in pairwise(found))


def test_modular_addition() -> None:
    """Oracle: golden. The recorded run memorises by step 150 and generalises near 2,400; restricted loss leads."""
    run = monitor.open(SAMPLES / "grokking_p41")
    found = phases(run)
    assert found is not None
    assert (found.train, found.test) == ("train_accuracy.accuracy cross_entropy", "logged.value val_acc")
    assert found.memorised is not None
    assert found.generalised is not None
    assert found.memorised <= 150
    assert 1800 <= found.generalised <= 2500
    assert found.label == "grokking"
    assert [p.name for p in found.timeline] == ["learning", "memorised", "generalising", "generalised"]
    steps, restricted = run.series("restricted_loss.restricted")
    halved = steps[np.argmax(restricted < restricted[1] / 2)]
    at, accuracy = run.series("logged.value", "val_acc")
    assert halved + 300 <= at[np.argmax(accuracy >= 0.5)]
    _, gini = run.series("gini.gini", "embed.weight")
    assert gini[-1] > 3 * gini[0]


def test_losses_of_a_probe_will_do(tmp_path: Path) -> None:
    """Oracle: definition. Without anything logged, the losses of FourierLosses: memorised, and 5 - 0.01 apart."""
    writer = RunWriter.create(tmp_path / "run", script="train.py")
    writer.append(
        [column("restricted_loss.train", [[4.0], *[[0.01]] * 5]), column("restricted_loss.test", [[5.0]] * 6)]
    )
    writer.close("finished")
    found = phases(monitor.open(writer.path))
    assert found is not None
    assert (found.train, found.test) == ("restricted_loss.train", "restricted_loss.test")
    assert (found.memorised, found.generalised, found.label) == (1, None, "memorised")
    assert found.gap == pytest.approx(4.99)


def test_a_run_without_held_out_data_has_no_phases() -> None:
    """Oracle: definition. Nothing is guessed from the training data alone."""
    assert phases(monitor.open(SAMPLES / "modular_addition_collapse")) is None


def test_log_time_is_exact_for_a_logarithm() -> None:
    """Oracle: closed form. ln t has slope 1, intercept 0 and r2 = 1; a square root has not; a constant has no r2."""
    steps = np.arange(0, 500, dtype=np.int64)
    with np.errstate(divide="ignore"):
        fit = log_time(steps, np.log(steps))
    assert fit is not None
    assert (fit.slope, fit.intercept, fit.r2) == pytest.approx((1, 0, 1))
    root = log_time(steps, np.sqrt(steps))
    assert root is not None
    assert root.r2 < 0.95
    flat = log_time(steps, np.ones(500))
    assert flat is not None
    assert np.isnan(flat.r2)
    assert log_time(steps[:3], np.ones(3)) is None


def test_the_distance_of_the_whole_is_fitted() -> None:
    """Oracle: naive transcription. The root of the sum of all parameters' squared distances, over ln of the step."""
    run = monitor.open(SAMPLES / "grokking_p41")
    ref = "distance_from_start.distance"
    each = [run.series(ref, name) for name in run.modules(ref)]
    steps = each[0][0]
    total = np.sqrt(sum(values**2 for _, values in each))
    x, y = np.log(steps[steps >= 1]), total[steps >= 1]
    slope, intercept = np.polyfit(x, y, 1)
    fit = log_distance(run)
    assert fit is not None
    assert (fit.slope, fit.intercept) == pytest.approx((slope, intercept))
    assert fit.r2 == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2)
