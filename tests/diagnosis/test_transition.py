"""The hint without held-out data: votes, what moves, what is missing, and that it is always said how little it is."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import monitor
from monitor.diagnosis.remarks import remarks
from monitor.diagnosis.transition import (
    AGREED,
    CAVEAT,
    MARKERS,
    MOVED,
    Marker,
    Transition,
    judge,
    slopes,
    told,
    transition,
)
from monitor.metric import Array
from monitor.store.run import Run, open_run
from monitor.store.writer import RunWriter
from tests.rules.series import column

SAMPLES = Path(__file__).parents[2] / "sample_runs"
GINI, ODD, NORM, CUT, DIMENSION, Z = MARKERS
N = 40
T = np.arange(N, dtype=np.float64)


def judged(every: int = 10, memorised: int = 0, **series: Array) -> Transition:
    """Of markers by the names of their metrics, evaluated every so many steps from step 0 on."""
    known = {m.ref.partition(".")[0]: m for m in MARKERS}
    return judge({known[k]: (np.arange(len(v), dtype=np.int64) * every, v) for k, v in series.items()}, memorised)


def naive(series: dict[Marker, list[float]], steps: list[int]) -> int | None:
    """The rule of the specification, word for word: slopes of five evaluations, three votes, five times."""
    in_a_row = 0
    for now in range(len(steps)):
        votes = 0
        for marker, values in series.items():
            if now < 4:
                continue
            last = range(now - 4, now + 1)
            slope = np.median([(values[j] - values[i]) / (steps[j] - steps[i]) for i, j in combinations(last, 2)])
            votes += bool(slope > 0) if marker.sign > 0 else bool(slope < 0)
        in_a_row = in_a_row + 1 if votes >= 3 else 0
        if in_a_row == 5:
            return steps[now]
    return None


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(3, 6), st.floats(0, 0.2))
def test_agreement_is_that_of_the_specification(seed: int, count: int, drift: float) -> None:
    """Oracle: naive transcription of the rule, on random walks with a drift, at irregular steps."""
    random = np.random.default_rng(seed)
    steps = np.cumsum(random.integers(1, 30, N))
    walks = {m: 10 + np.cumsum(random.normal(m.sign * drift, 0.3, N)) for m in MARKERS[:count]}
    found = judge({m: (steps, v) for m, v in walks.items()}, 0)
    assert found.agreed == naive({m: v.tolist() for m, v in walks.items()}, steps.tolist())


def test_slopes() -> None:
    """Oracle: closed form. A line has its slope whatever two of five points do; the first four points have none."""
    steps = np.array([0, 1, 3, 4, 8, 9, 20], np.int64)
    found = slopes(steps, 2 * steps.astype(np.float64))
    assert np.isnan(found[:4]).all()
    assert found[4:] == pytest.approx(2)
    assert len(slopes(steps[:3], np.ones(3))) == 3
    wild = 2 * steps.astype(np.float64)
    wild[5] = np.nan
    assert np.isnan(slopes(steps, wild)[5:]).all()


def test_what_leads_has_to_move_far() -> None:
    """Oracle: closed form. Half as much again is reached at the tenth evaluation, the fifth in a row is the 14th."""
    rises = judged(gini=1 + 0.05 * T)
    assert (rises.moved, rises.agreed) == (140, None)
    assert judged(gini=1 + 0.01 * T).moved is None  # as steadily, and not far
    assert judged(odd_fraction=np.maximum(1 - 0.05 * T, 0.01 * T)).moved == 140
    assert judged(gini=1 - 0.01 * T, odd_fraction=np.linspace(1, 0.1, N)).moved is not None  # one is enough
    assert judged(odd_fraction=1 + 0.1 * T).moved is None  # the wrong way


def test_it_counts_from_memorisation_on() -> None:
    """Oracle: closed form. What moved before does not count: 2 at step 200, and a twentieth more each time."""
    gini = np.concatenate([np.linspace(1, 2, 20), 2 + 0.1 * np.arange(30.0)])
    found = judged(memorised=200, gini=gini)
    assert found.memorised == 200
    assert found.moved == 200 + 10 * 14
    assert found.votes[0].factor == pytest.approx(gini[-1] / 2)


def test_a_jump_and_a_gap_are_no_transition() -> None:
    """Oracle: planted fault. One outlier, or values that are not finite, move nothing."""
    flat = np.ones(N)
    outlier = np.where(T == 20, 9.0, flat)
    assert judged(gini=outlier).moved is None
    for wild in (np.nan, np.inf):
        found = judged(gini=np.where(T % 3 == 0, wild, 1 + T))
        assert found.moved is None


@given(st.floats(1e-6, 1e6))
def test_units_do_not_matter(unit: float) -> None:
    """Oracle: invariance. Each marker in other units votes the same."""
    series = {"gini": 1 + 0.05 * T, "param_norm": 2 - 0.01 * T, "zscore_target": 1 + T}
    found, other = judged(**series), judged(**{k: unit * v for k, v in series.items()})
    assert (found.moved, found.agreed) == (other.moved, other.agreed)
    assert found.agreed == 80  # the ninth evaluation: five slopes


def test_markers_are_compared_where_the_rarest_was_measured() -> None:
    """Oracle: invariance. A marker measured ten times as often says the same as at the steps of the others."""
    steps = 100 * T.astype(np.int64)
    often = np.arange(10 * N, dtype=np.int64) * 10
    walk = 10 + np.cumsum(np.random.default_rng(0).normal(-0.05, 0.3, 10 * N))
    others = {GINI: (steps, 1 + 0.01 * T), CUT: (steps, 5 - 0.1 * T)}
    found = judge({NORM: (often, walk), **others}, 0)
    assert found.agreed == judge({NORM: (steps, walk[::10]), **others}, 0).agreed


def test_too_few_markers_are_named() -> None:
    """Oracle: definition. Fewer than three, none that leads, or one measured eight times: absent, and said why."""
    two = judged(gini=np.ones(N), param_norm=np.ones(N))
    assert two.agreed is None
    assert two.why == "of the 3 markers it takes there is gini, param_norm"
    none = judged(local_complexity=np.ones(N), param_norm=np.ones(N), zscore_target=np.ones(N))
    assert none.moved is None
    assert none.why == "none of gini, odd_fraction was measured often enough"
    assert judged(gini=np.ones(8)).votes == ()
    assert told(judged(gini=np.ones(8))) == ""
    assert "there is none" in judge({}, 0).why


def run_of(folder: Path, **logged: list[float]) -> Run:
    """A run with a Gini coefficient that rises from 0.1 to 0.5, and what the script logged."""
    writer = RunWriter.create(folder / "run", script="train.py")
    gini = [[v] for v in np.linspace(0.1, 0.5, N)]
    writer.append([column("gini.gini", gini, ("embed.weight",))])
    writer.append([column("logged.value", list(zip(*logged.values(), strict=True)), tuple(logged))])
    writer.close("finished")
    return open_run(writer.path)


def test_it_is_said_only_where_nothing_better_is_known(tmp_path: Path) -> None:
    """Oracle: definition. With the caveat and the record; not beside held-out data; no verdict depends on it."""
    learned = [0.1] + [1.0] * (N - 1)
    run = run_of(tmp_path / "alone", train_acc=learned)
    verdict = run.verdict()
    (line,) = (r.text for r in remarks(run, verdict) if r.family == "phases")
    assert line.startswith(f"{CAVEAT}; learned at step 1; gini ×4.53 since, far enough from step ")
    (a, b), (c, d) = MOVED.generalised, MOVED.never
    assert f"as in {a} of {b} runs that generalised later and {c} of {d} that never did" in line
    assert not verdict.incidents
    beside = run_of(tmp_path / "beside", train_acc=learned, val_acc=[0.1] * N)
    assert all(CAVEAT not in r.text for r in remarks(beside, beside.verdict()))
    assert transition(run_of(tmp_path / "never", train_acc=[0.5] * N)) is None


def test_every_word_of_it_fits() -> None:
    """Oracle: definition. All that can be said at once, the record of the votes too, is within what inspect shows."""
    falls, rises = np.linspace(1, 0.1, N), np.linspace(1, 9, N)
    line = told(
        judged(1000, gini=rises, odd_fraction=falls, param_norm=falls, local_complexity=falls, zscore_target=rises)
    )
    assert f"also agreed on {AGREED.never[0]} of {AGREED.never[1]} runs that never generalised" in line
    assert len(line) <= 300


def test_modular_addition() -> None:
    """Oracle: golden. The recorded run: the Gini coefficient has moved 300 steps before half of the pairs are right."""
    run = monitor.open(SAMPLES / "grokking_p41")
    found = transition(run)
    assert found is not None
    steps, accuracy = run.series("logged.value", "val_acc")
    assert found.memorised == 64
    assert found.moved is not None and found.moved + 300 < steps[np.argmax(accuracy >= 0.5)]
    assert found.why == ""
    assert [v.ref for v in found.votes] == ["gini.gini", "param_norm.norm", "zscore_target.mean"]
    for name in ("modular_addition_collapse", "moe_digits_random_labels"):
        other = transition(monitor.open(SAMPLES / name))
        assert other is not None and other.moved is None and "none of gini, odd_fraction" in other.why
