"""Runs side by side: what differs, where two part, what a sweep says."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import monitor
from monitor.block import ColumnBlock
from monitor.diagnosis.comparison import (
    BLOCK,
    HOLD,
    Departure,
    Difference,
    apart,
    band,
    compare,
    departures,
    extrapolate,
    names,
    overlay,
    parting,
    sensitivity,
)
from monitor.metric import Array
from monitor.store.run import Run, open_run
from monitor.store.writer import RunWriter

STEPS = 300

#: ``metric.column`` -> module -> one value per step.
Series = Mapping[str, Mapping[str, Array]]


def write(path: Path, series: Series, *, first: int = 0, every: int = 1, resume: bool = False, **fields: Any) -> Run:
    """A run with just these series."""
    writer = RunWriter.create(path, script="train.py", resume=resume, start_step=first)
    writer.update(**fields)
    for ref, modules in series.items():
        values = np.stack(list(modules.values()), axis=1)
        steps = first + every * np.arange(len(values), dtype=np.int64)
        metric, _, column = ref.partition(".")
        has = np.ones(values.shape, dtype=np.bool_)
        writer.append([ColumnBlock(metric, column, steps, tuple(modules), values, has)])
    writer.flush(force=True)
    writer.close("finished")
    return open_run(writer.path)


def noisy(seed: int, scale: float = 1.0, n: int = STEPS) -> Array:
    falling = 0.2 + np.exp(-np.arange(n) / 60)
    return (scale * falling * np.random.default_rng(seed).normal(1.0, 0.05, n)).astype(np.float32).astype(np.float64)


def healthy(seed: int) -> dict[str, dict[str, Array]]:
    return {
        "loss.value": {"": noisy(seed)},
        "grad_norm.norm": {m: noisy(100 * seed + i) for i, m in enumerate("abc")},
        "input_rms.rms": {"input[0]": noisy(7)},
    }


def optimizer(lr: float, **more: Any) -> dict[str, Any]:
    return {"class": "AdamW", "groups": [{"lr": lr, "parameters": 3, **more}]}


def sized(n: int, **more: Any) -> dict[str, Any]:
    return {"class": "Net", "parameters": [{"name": "w", "numel": n, "dtype": "float32"}], **more}


# ---------------------------------------------------------------------- where two runs part


def test_a_run_and_its_copy(tmp_path: Path) -> None:
    """Oracle: invariance. Nothing of a run differs from itself, whatever is in it; durations may."""
    odd = healthy(0) | {"clip.coefficient": {"": np.where(np.arange(STEPS) % 3, np.nan, np.inf)}}
    a = write(tmp_path / "a", odd | {"step_time.seconds": {"": noisy(1)}})
    b = write(tmp_path / "b", odd | {"step_time.seconds": {"": noisy(2)}})
    p = parting(a, b)
    assert (p.series, p.identical_until, p.first, p.start, p.later) == (6, STEPS - 1, (), (), ())


def test_the_first_difference_is_the_cause(tmp_path: Path) -> None:
    """Oracle: planted fault. What a step reaches first stands first, and nothing differed before it."""
    good, bad = healthy(0), healthy(0)
    for ref, module in (("loss.value", ""), ("grad_norm.norm", "b"), ("input_rms.rms", "input[0]")):
        bad[ref][module] = bad[ref][module].copy()
        bad[ref][module][200] *= 100
    bad["loss.value"][""][250] *= 2  # later, and no longer news
    p = parting(write(tmp_path / "a", good), write(tmp_path / "b", bad))
    assert p.identical_until == 199
    assert [(d.ref, d.module, d.step) for d in p.first] == [
        ("input_rms.rms", "input[0]", 200),
        ("loss.value", "", 200),
        ("grad_norm.norm", "b", 200),
    ]
    assert p.first[0].value == pytest.approx(100 * p.first[0].reference)
    assert (p.start, p.later) == ((), ())  # one wild point is no parting


def test_the_band_finds_the_step(tmp_path: Path) -> None:
    """Oracle: planted fault. Series that shift by ten bands part where they shift, in the order of the steps."""
    a, b = healthy(0), healthy(1)
    b["loss.value"][""][150:] *= 4
    b["grad_norm.norm"]["a"][120:] *= 5
    b["grad_norm.norm"]["c"] = b["grad_norm.norm"]["c"] * 6
    p = parting(write(tmp_path / "a", a), write(tmp_path / "b", b))
    assert p.identical_until is None
    assert [(d.ref, d.module, d.step) for d in p.later] == [("grad_norm.norm", "a", 120), ("loss.value", "", 150)]
    assert [(d.module, d.step) for d in p.start] == [("c", 0)]
    loss = p.later[1]
    assert loss.low < loss.reference < loss.high < loss.value
    assert isinstance(loss, Departure)


def test_noise_is_no_parting(tmp_path: Path) -> None:
    """Oracle: invariance. 400 pairs of series with the same law and different noise never part."""
    for kind, law in enumerate(
        (np.random.default_rng(0).normal, np.random.default_rng(0).lognormal, np.random.default_rng(0).laplace)
    ):
        a, b = ({"grad_norm.norm": {str(m): law(3.0, 0.3, STEPS) for m in range(400)}} for _ in range(2))
        p = parting(write(tmp_path / f"a{kind}", a), write(tmp_path / f"b{kind}", b))
        assert (p.judged, p.start, p.later) == (400, (), ())


def test_a_run_that_is_some_steps_behind_has_not_parted(tmp_path: Path) -> None:
    """Oracle: invariance. A fall that begins ten steps later is inside the band."""
    fall = 1 / (1 + np.exp((np.arange(STEPS + 10) - 150) / 8)) + 0.01
    late = {"loss.value": {"": fall[:STEPS]}}
    assert parting(write(tmp_path / "a", {"loss.value": {"": fall[10:]}}), write(tmp_path / "b", late)).later == ()


def test_not_finite(tmp_path: Path) -> None:
    """Oracle: planted fault. A NaN parts at once unless the reference has some too; equal NaN are no difference."""
    a, b = healthy(0), healthy(0)
    b["loss.value"][""] = np.where(np.arange(STEPS) == 290, np.nan, a["loss.value"][""])
    p = parting(write(tmp_path / "a", a), write(tmp_path / "b", b))
    assert [(d.ref, d.step) for d in p.later] == [("loss.value", 290)]
    assert math.isnan(p.later[0].value)
    a["loss.value"][""] = np.where(np.arange(STEPS) == 10, np.inf, a["loss.value"][""])
    assert parting(write(tmp_path / "c", a), write(tmp_path / "d", b)).later == ()


def test_different_steps(tmp_path: Path) -> None:
    """Oracle: definition. Only common steps count: other schedules, ranges, and what a later attempt replaced."""
    whole, half = write(tmp_path / "a", healthy(0)), write(tmp_path / "b", healthy(0), first=100)
    p = parting(whole, half)
    assert (p.first_step, p.last_step) == (100, STEPS - 1)
    thinned = {ref: {m: v[::5] for m, v in s.items()} for ref, s in healthy(0).items()}
    p = parting(whole, write(tmp_path / "c", thinned, every=5))
    assert (p.series, p.judged, p.identical_until) == (5, 5, 295)
    p = parting(whole, write(tmp_path / "d", healthy(0), first=10_000))
    assert (p.series, p.judged, p.first_step, p.identical_until, p.first) == (0, 0, None, None, ())
    few = {ref: {m: v[: HOLD - 1] for m, v in s.items()} for ref, s in healthy(1).items()}
    p = parting(whole, write(tmp_path / "e", few))
    assert (p.judged, p.later, p.start) == (0, (), ())
    write(tmp_path / "f", {ref: {m: 9 * v[:50] for m, v in s.items()} for ref, s in healthy(0).items()}, first=100)
    again = {ref: {m: v[40:] for m, v in s.items()} for ref, s in healthy(0).items()}
    resumed = write(tmp_path / "f", again, first=40, resume=True)
    assert parting(whole, resumed).identical_until == STEPS - 1


def test_nothing_in_common(tmp_path: Path) -> None:
    """Oracle: definition. Other models and empty runs have nothing to lay over each other, and say so."""
    a = write(tmp_path / "a", {"grad_norm.norm": {"x": noisy(0)}})
    for name, series in (("b", {"grad_norm.norm": {"y": noisy(0)}}), ("c", {}), ("d", {"gone.value": {"": noisy(0)}})):
        p = parting(a, write(tmp_path / name, series))
        assert (p.series, p.first, p.identical_until) == (0, (), None)


@pytest.mark.parametrize("n", [1, 4, 19, 20, 21, 39, 40, 100])
@pytest.mark.parametrize("log", [False, True])
def test_band_of_any_length(n: int, log: bool) -> None:
    """Oracle: invariance. Every length has a band, and no series leaves its own."""
    x = np.random.default_rng(n).lognormal(0, 2, (5, n))
    x[0], x[1] = 0.0, -x[1]
    has = np.random.default_rng(1).random((5, n)) < 0.9
    low, high = band(x, has, log)
    assert low.shape == high.shape == x.shape
    assert (low[has] <= x[has]).all() and (x[has] <= high[has]).all()
    assert (departures(x, has, x, has, low, high) == -1).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 130), st.integers(0, 10_000), st.booleans())
def test_band_against_a_naive_one(n: int, seed: int, log: bool) -> None:
    """Oracle: naive transcription of the definition, point by point."""
    rng = np.random.default_rng(seed)
    x = rng.lognormal(0, 1, (1, n)).astype(np.float32).astype(np.float64) * (1 if log else rng.choice([-1, 1], (1, n)))
    has = rng.random((1, n)) < 0.9
    low, high = band(x, has, log)
    values = np.log(x[0]) if log else x[0]
    blocks = max(n // BLOCK, 1)
    edges = []
    for k in range(blocks):
        block = values[k * BLOCK : (k + 1) * BLOCK][has[0, k * BLOCK : (k + 1) * BLOCK]]
        if len(block) < 5:
            edges.append((np.nan, np.nan))
            continue
        middle = np.median(block)
        floor = 2**-9 * (1 if log else abs(middle))
        reach = 4 * max(1.4826 * np.median(np.abs(block - middle)), floor)
        wild = len(block) // 8
        edges.append((np.sort(block)[wild] - reach, np.sort(block)[::-1][wild] + reach))
    for t in np.flatnonzero(has[0]):
        k = min(t // BLOCK, blocks - 1)
        near = np.array(edges[max(k - 2, 0) : k + 3])
        assert np.isnan(near).all() == (np.isnan(low[0, t]) or low[0, t] == high[0, t] == x[0, t])
        if not np.isnan(near).all():
            wanted = np.nanmin(near[:, 0]), np.nanmax(near[:, 1])
            wanted = np.exp(wanted) if log else wanted
            assert low[0, t] == pytest.approx(min(wanted[0], x[0, t]), rel=1e-4, abs=1e-5)
            assert high[0, t] == pytest.approx(max(wanted[1], x[0, t]), rel=1e-4, abs=1e-5)


def test_a_large_run_is_read_in_portions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: invariance. What does not fit the memory is laid over each other piece by piece."""
    a, b = write(tmp_path / "a", healthy(0)), write(tmp_path / "b", healthy(1))
    whole = parting(a, b)
    monkeypatch.setattr(overlay, "_VALUES", 1)
    assert parting(a, b) == whole


def digits(run_dir: Path, spoil: Callable[[int], float]) -> None:
    """A small training whose inputs are scaled in some steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    handle = monitor.attach(model, run_dir=run_dir)
    for step in range(80):
        x = torch.randn(32, 16)
        loss = nn.functional.cross_entropy(model(x * spoil(step)), x[:, :4].argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    handle.close()


def test_two_trainings_part_where_one_is_spoilt(tmp_path: Path) -> None:
    """Oracle: planted fault. Two real trainings with one seed, of which one has a batch that is too large."""
    digits(tmp_path / "good", lambda step: 1.0)
    digits(tmp_path / "again", lambda step: 1.0)
    digits(tmp_path / "bad", lambda step: 100.0 if step == 50 else 1.0)
    good, again, bad = (open_run(tmp_path / n) for n in ("good", "again", "bad"))
    assert parting(good, again).first == ()
    p = parting(good, bad)
    assert p.identical_until == 49
    assert (p.first[0].ref, p.first[0].module, p.first[0].step) == ("input_rms.rms", "input[0]", 50)


# ---------------------------------------------------------------------- sweeps


def test_sensitivity() -> None:
    """Oracle: closed form. (3, 2, 1, 1, 2, 9, NaN) from 5: mean(3, 2, 1, 1, 2, 5, 5) - 1 = 12/7."""
    losses = [3.0, 2.0, 1.0, 1.0, 2.0, 9.0, math.nan]
    assert sensitivity(losses, [5.0] * 7) == pytest.approx(12 / 7)
    assert sensitivity([1.0] * 3, [5.0] * 3) == 0.0


def test_extrapolate() -> None:
    """Oracle: closed form. 10, 100, 1000 at 1e6, 1e7, 1e8 give 1e4 at 1e9; a parabola is met at any point."""
    assert extrapolate([1e6, 1e7, 1e8], [10, 100, 1000], 1e9) == pytest.approx(1e4, rel=1e-12)
    sizes = np.array([3e5, 2e6, 1.1e7, 4e8])
    curve = 10 ** (0.3 * np.log10(sizes) ** 2 - 2 * np.log10(sizes) + 1.5)
    wanted = 10 ** (0.3 * math.log10(4e9) ** 2 - 2 * math.log10(4e9) + 1.5)
    assert extrapolate(list(sizes), list(curve), 4e9) == pytest.approx(wanted, rel=1e-9)


def flat(first: float, last: float) -> dict[str, dict[str, Array]]:
    """A loss that is ``first`` once and ``last`` from half-way on."""
    return {"loss.value": {"": np.concatenate([[first], np.full(149, 2.0), np.full(150, last)])}}


def test_a_sweep_over_learning_rates(tmp_path: Path) -> None:
    """Oracle: closed form. The same 12/7 from runs; two seeds of one rate count as their mean; two rates are none."""
    ends = [(3e-4, 3.0), (1e-3, 2.0), (3e-3, 1.0), (1e-2, 1.0), (3e-2, 2.0), (1e-1, 9.0), (3e-1, math.nan)]
    runs = [
        write(tmp_path / f"{lr:g}", flat(5.0, last), facts=sized(10, optimizers=[optimizer(lr)])) for lr, last in ends
    ]
    (s,) = compare(runs, pairs=0).sensitivity
    assert s.value == pytest.approx(12 / 7)
    assert (s.parameters, s.rates, s.best) == (10, tuple(lr for lr, _ in ends), 3e-3)
    assert s.losses == pytest.approx((3, 2, 1, 1, 2, 5, 5))
    seed = write(tmp_path / "seed", flat(5.0, 3.0), facts=sized(10, optimizers=[optimizer(1e-2)]))
    assert compare([*runs, seed], pairs=0).sensitivity[0].losses[3] == pytest.approx(2.0)
    assert compare(runs[:2], pairs=0).sensitivity == ()
    nothing = [write(tmp_path / f"n{i}", {}, facts=sized(10, optimizers=[optimizer(0.1 * i)])) for i in (1, 2, 3)]
    assert compare(nothing).sensitivity == ()


def test_a_sweep_over_sizes(tmp_path: Path) -> None:
    """Oracle: closed form. The logits of the first block, its largest head, at 2 % of the way."""

    def one(n: int, logit: float, lr: float = 1e-3) -> Run:
        grown = np.where(np.arange(STEPS) <= 5, logit, 1e9)  # 2 % of the last step, 299, is step 5
        heads = {"blocks.0[0]": grown / 2, "blocks.0[1]": grown, "blocks.1[0]": 50 * grown}
        series = flat(5.0, 1.0) | {"attn_logit_max.lse_max": heads}
        return write(tmp_path / f"{n}-{lr}", series, facts=sized(n, optimizers=[optimizer(lr)]))

    runs = [one(10**6, 10), one(10**7, 100), one(10**8, 1000)]
    (e,) = compare(runs, pairs=0).extrapolation
    assert (e.step, e.parameters, e.logits, e.size) == (5, (10**6, 10**7, 10**8), (10.0, 100.0, 1000.0), 10**9)
    assert e.predicted == pytest.approx(1e4)
    assert not e.beyond
    more = [one(10**6, 10, 3e-3), one(10**7, 100, 3e-3), one(10**8, 2000, 3e-3)]
    found = compare([*runs, *more], pairs=0).extrapolation
    assert [(x.rate, x.beyond) for x in found] == [(1e-3, False), (3e-3, True)]
    alike = [one(10**6, 10, 1e-4), one(1_100_000, 11, 1e-4), one(1_200_000, 12, 1e-4)]
    (e,) = compare(alike, pairs=0).extrapolation
    assert math.isnan(e.predicted)
    assert not e.beyond


# ---------------------------------------------------------------------- the table


def test_what_differs(tmp_path: Path) -> None:
    """Oracle: golden. Only what is not equal, an option together with its value."""
    modules = [{"name": n, "class": c} for n, c in (("", "Net"), ("a", "Linear"), ("b", "ReLU"))]
    facts = sized(
        1000,
        modules=modules,
        optimizers=[optimizer(1e-3, betas=[0.9, 0.99], weight_decay=0.0)],
        precision={"autocast": False},
        argv=["train.py", "--lr", "1e-3", "--seed=0", "out/a"],
    )
    other = facts | {
        "modules": [*modules[:2], {"name": "b", "class": "GELU"}],
        "optimizers": [optimizer(1e-2, betas=[0.9, 0.95], weight_decay=0.0)],
        "precision": {"autocast": True},
        "argv": ["train.py", "--lr", "1e-2", "--seed=0", "out/b"],
    }
    versions = {"torch": "2.13.0"}
    a = write(tmp_path / "a", healthy(0), facts=facts, versions=versions)
    b = write(tmp_path / "b", healthy(0), facts=other, versions={"torch": "2.12.0"})
    assert compare([a, b]).differs == {
        "ReLU modules": ("1", ""),
        "GELU modules": ("", "1"),
        "peak lr": ("0.001", "0.01"),
        "betas": ("(0.9, 0.99)", "(0.9, 0.95)"),
        "precision autocast": ("False", "True"),
        "arguments": ("--lr 1e-3 out/a", "--lr 1e-2 out/b"),
        "torch version": ("2.13.0", "2.12.0"),
    }
    assert compare([a, a]).differs == {}


@pytest.mark.parametrize(
    "facts",
    [
        {"optimizers": [{"groups": 3}, {"groups": [1, {"lr": "x"}]}], "argv": 5},
        {"parameters": [{"name": "w", "numel": "many", "dtype": []}], "class": {"a": [1]}, "more": {"x": {"y": None}}},
        {"modules": [{"name": "", "class": None}, {"name": "x"}], "argv": [], "precision": {}},
    ],
)
def test_facts_of_the_wrong_shape(tmp_path: Path, facts: dict[str, Any]) -> None:
    """Oracle: planted fault. Odd facts are told as they are."""
    odd = write(tmp_path / "odd", healthy(0), facts=facts)
    assert compare([odd, write(tmp_path / "good", healthy(0))]).rows[0].loss is not None


def test_rows(tmp_path: Path) -> None:
    """Oracle: definition. Last values, peak learning rate, verdict and where it begins."""
    series = healthy(0) | {
        "learning_rate.lr": {"group[0]": np.linspace(0, 1e-3, STEPS), "group[1]": np.linspace(1e-4, 0, STEPS)},
        "logged.value": {"val_loss": np.linspace(3, 1, STEPS)},
    }
    series["input_rms.rms"]["input[0]"] = np.where(np.arange(STEPS) == 200, 99.0, 1.0)
    rows = compare([write(tmp_path / "a", series, facts=sized(1000)), write(tmp_path / "b", {})]).rows
    a, b = rows
    assert (a.name, a.status, a.steps, a.first_step, a.last_step) == ("a", "finished", STEPS, 0, STEPS - 1)
    assert (a.rate, a.parameters, a.logged, a.level) == (1e-3, 1000, {"val_loss": 1.0}, "warning")
    assert (a.head, a.onset) == ("Input jump", 200)
    assert (b.steps, b.loss, b.rate, b.logged, b.level, b.onset) == (0, None, None, {}, "not_enough_evidence", None)


def test_names() -> None:
    """Oracle: definition. As short as can be told apart."""
    assert names([Path("/r/a/x"), Path("/r/b/x"), Path("/r/b/y")]) == ["a/x", "b/x", "y"]
    assert names([Path("x"), Path("x")]) == ["x", "x"]
    assert names([]) == []


def test_a_difference_can_be_seen() -> None:
    """Oracle: definition. Of two values that look the same in the digits shown, what lies between them is said."""
    assert apart(Difference("loss.value", "", "loss", 3, 9.951, 9.9512)) == "9.951, 0.0002 apart"
    assert apart(Difference("loss.value", "", "loss", 3, 1.0, 2.0)) == "2 against 1"
    assert apart(Difference("loss.value", "", "loss", 3, float("nan"), 2.0)) == "2 against nan"


def test_only_so_many_runs_are_laid_over_the_first(tmp_path: Path) -> None:
    """Oracle: definition. The first ones, in the order given."""
    runs = [write(tmp_path / str(i), healthy(0)) for i in range(4)]
    assert [p.run for p in compare(runs, pairs=2).partings] == [1, 2]
    assert [p.run for p in compare(runs).partings] == [1, 2, 3]


def test_it_is_fast(tmp_path: Path) -> None:
    """Oracle: definition. 100 series of 2,000 steps, twice, in well under half a second of CPU time."""
    values = np.random.default_rng(0).lognormal(0, 0.3, (2000, 100))
    series = {"grad_norm.norm": {f"m{i}": values[:, i] for i in range(100)}}
    a, b = write(tmp_path / "a", series), write(tmp_path / "b", series)
    before = process_time()
    parting(a, b)
    assert process_time() - before < 0.4
