"""The fold: the same findings however the series are cut, stopped and continued."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import inf, isnan, nan
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import monitor.rules
from monitor.block import ColumnBlock
from monitor.diagnosis.engine import Engine, place, rules_hash
from monitor.rule import FactHit, Hits, Param, Remedy, Rule, Window, load_rules
from tests.rules.series import column, cut, end, fold, recorded

RULES = load_rules()


def above(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Values above a limit, or not finite; critical from ten times the limit on."""
    block = window["loss.value"]
    value, has = block["loss.value"], block.has("loss.value")
    mask = has & ((value > p["limit"]) | ~np.isfinite(value))
    yield Hits(block.steps, block.modules, mask, has, value, p["limit"], {"twice": 2 * value}, value > 10 * p["limit"])


LIMIT = Rule(
    id="limit",
    title="Limit",
    severity="warning",
    site="loss",
    message="{value} is above {threshold}.",
    refute="never",
    remedies=(Remedy("nothing"),),
    params=(Param("limit", 1.0, "1", "a test"),),
    needs=("loss.value",),
    check=above,
    hold=1,
    release=3,
)


def limit(values: list[float | None], **changes: Any) -> Engine:
    return fold({"limit": replace(LIMIT, **changes)}, [column("loss.value", values)])


def test_episode() -> None:
    """Oracle: closed form. Broken at 2, 3 and 5; two sound points do not end an episode that needs three."""
    (f,) = limit([0, 0, 2, 5, 0, 3, 0, 0]).findings()
    assert (f.first_step, f.last_step, f.count, f.peak_step, f.value, f.threshold) == (2, 5, 3, 3, 5.0, 1.0)
    assert (f.open, f.severity, f.evidence) == (False, "warning", {"twice": 10.0})
    assert [f.first_step for f in limit([0, 2, 0, 0, 0, 2]).findings()] == [1, 5]
    assert limit([0, 2]).findings()[0].open


def test_hold() -> None:
    """Oracle: closed form. An episode of hold 3 begins with the first of three consecutive broken points."""
    assert limit([2, 2, 0, 2, 2], hold=3).findings() == []
    (f,) = limit([2, 2, 0, 2, 2, None, None, 2, 0], hold=3).findings()
    assert (f.first_step, f.last_step, f.count) == (3, 7, 3)


def test_worst_point() -> None:
    """Oracle: closed form. The peak is the worst relative to the threshold, and nothing is worse than NaN."""
    assert limit([2, 7, 7, 3]).findings()[0].peak_step == 1
    (f,) = limit([2, 70, nan, inf, 3]).findings()
    assert f.peak_step == 2 and isnan(f.value) and f.severity == "critical"
    assert f.evidence == {}  # a NaN is no evidence


def test_rules_see_nothing_beyond_their_lookback() -> None:
    """Oracle: invariance. A check that sums its window gives the same however far the history of others reaches."""
    seen: dict[int, float] = {}

    def total(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
        block = window["loss.value"]
        x = block["loss.value"][:, 0]
        for i in np.flatnonzero(block.steps >= window.first):
            seen[int(block.steps[i])] = float(x[max(i - 4, 0) : i + 1].sum())
        assert np.count_nonzero(block.steps < window.first) <= 4
        return ()

    rules = {"short": replace(LIMIT, check=total, lookback=4), "long": replace(LIMIT, id="long", lookback=900)}
    fold(rules, [column("loss.value", [float(t) for t in range(300)])], size=7)
    assert seen == {t: float(sum(range(max(t - 4, 0), t + 1))) for t in range(300)}


def test_a_broken_rule_goes_alone() -> None:
    """Oracle: planted fault. A check that raises is switched off, says why, and keeps what it had found."""

    def breaks(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
        if window.first >= 10:
            raise ZeroDivisionError("by nothing")
        return above(window, p)

    rules = {"limit": LIMIT, "breaks": replace(LIMIT, id="breaks", check=breaks)}
    engine = fold(rules, [column("loss.value", [0, 2, *[0] * 50, 2.0])], size=10)
    assert [(f.rule, f.first_step) for f in engine.findings()] == [("breaks", 1), ("limit", 1), ("limit", 52)]
    assert engine.unjudged() == {
        "breaks": "its check failed in the block from step 10 on: ZeroDivisionError: by nothing"
    }
    twice = replace(LIMIT, check=lambda w, p: [*above(w, p), *above(w, p)])
    assert "expected one per site" in fold({"limit": twice}, [column("loss.value", [1.0])]).unjudged()["limit"]


def test_unjudged_says_why() -> None:
    """Oracle: definition. Nothing recorded, too little recorded, facts missing; and silence once a point was judged."""
    assert Engine(RULES, {}).unjudged()["loss_spike"] == "not enough evidence: loss.value was not recorded"
    short = fold(RULES, [column("loss.value", [1.0] * 12)])
    assert short.unjudged()["loss_spike"] == "not enough evidence: 12 of 20 points of loss.value"
    assert short.unjudged()["unoptimized_parameter"] == "not enough evidence: the run does not say its optimizers"
    assert "nonfinite" not in short.unjudged()
    # of a rule none of whose series was recorded there is nothing to have more evidence of
    assert short.unjudged()["input_jump"] == "not applicable: input_rms.rms was not recorded"
    assert {"input_jump", "load_imbalance"} <= set(short.inapplicable())
    assert not {"loss_spike", "nonfinite", "unoptimized_parameter"} & set(short.inapplicable())
    assert Engine(RULES, {}).inapplicable() == ()
    assert "loss_spike" not in fold(RULES, [column("loss.value", [1.0] * 21)]).unjudged()
    without = fold(RULES, [column("loss.value", [1.0] * 250)]).unjudged()["no_better_than_guessing"]
    assert without == "not enough evidence: at none of 250 points of loss.value was all known that it takes"
    only_others = fold(RULES, [column("param_norm.norm", [1.0], ("w",))])
    assert "nonfinite" not in only_others.unjudged()


def test_facts() -> None:
    """Oracle: definition. Facts may come late; an audit that fails is told, not raised."""

    def audit(facts: Mapping[str, Any], p: Mapping[str, float]) -> Iterable[FactHit]:
        return [FactHit(name, 1.0, 0.0) for name in facts["names"]]

    engine = Engine({"a": replace(LIMIT, id="a", needs=(), check=None, audit=audit)}, {})
    assert engine.findings() == [] and "names" in engine.unjudged()["a"]
    engine.facts = {"names": ["y", "x"]}
    assert [(f.module, f.order) for f in engine.findings()] == [("y", 0), ("x", 1)]
    engine.facts = {"names": 3}
    assert engine.unjudged() == {"a": "its audit failed: TypeError: 'int' object is not iterable"}


def test_order_of_execution_comes_from_the_facts() -> None:
    """Oracle: definition. Where the facts know the modules, their order decides, not that of first appearance."""
    values = column("grad_norm.norm", [[1.0, 1.0]] * 60 + [[99.0, 99.0]], ("late", "early"))
    rules = {"gradient_spike": RULES["gradient_spike"]}
    assert [f.module for f in fold(rules, [values]).findings()] == ["late", "early"]
    facts = {"parameters": [{"name": "early"}, {"name": "late"}]}
    assert [f.module for f in fold(rules, [values], facts=facts).findings()] == ["early", "late"]


def test_the_next_attempt_keeps_what_was_found() -> None:
    """Oracle: definition. Findings of an earlier attempt stay, closed; its points are no baseline for the next."""
    engine = limit([0, 2])
    later = Engine({"limit": LIMIT}, {}, attempt=1, state=json.loads(json.dumps(engine.state())))
    later.feed([column("loss.value", [2, 0], steps=[1, 2])])
    assert [(f.attempt, f.first_step, f.open) for f in later.findings()] == [(0, 1, False), (1, 1, False)]
    assert later.state()["attempts"] == [0, 1]


def test_steps_that_were_fed_are_ignored() -> None:
    """Oracle: invariance. Blocks that overlap count once."""
    engine = Engine({"limit": LIMIT}, {})
    values = column("loss.value", [0, 2, 0, 0, 2, 0])
    engine.feed(cut([values], 0, 4))
    engine.feed([values])
    engine.feed([])
    assert engine.last_step == 5
    assert [f.count for f in engine.findings()] == [2]


def awkward(rng: np.random.Generator, steps: int) -> list[ColumnBlock]:
    """Columns on different schedules, with gaps, outliers, NaNs, infinities and a module that appears half-way.

    Columns of one pass share their steps, as recorded ones do.
    """
    columns = []
    late = int(steps * 0.4)

    def add(modules: tuple[str, ...], every: int, **scales: float) -> None:
        rows = np.flatnonzero(rng.random(steps) < 0.95)
        rows = rows[rows % every == 0]
        has = rng.random((len(rows), len(modules))) < 0.97
        for ref, scale in scales.items():
            x = np.exp(scale * rng.standard_normal(has.shape))
            wild = rng.random(x.shape)
            x[wild < 0.02] *= 1e4
            x[(wild > 0.990) & (wild < 0.995)] = np.nan
            x[wild > 0.995] = np.inf
            metric, name = ref.split(".")
            for part, known in ((rows < late, modules[:-1] or modules), (rows >= late, modules)):
                n = len(known)
                columns.append(ColumnBlock(metric, name, rows[part], known, x[part, :n], has[part, :n]))

    add(("",), 1, **{"loss.value": 0.3})
    add(("a", "b", "c"), 1, **{"grad_norm.norm": 0.2, "grad_norm.nonfinite": 0.0, "spam_spike.ratio": 3.0})
    add(("input[0]", "input[1]"), 3, **{"input_rms.rms": 0.1})
    add(
        ("cross_entropy",),
        2,
        **{"loss_zero_frac.frac": 0.0, "loss_zero_frac.rows": 2.0, "train_accuracy.accuracy": 0.0},
    )
    add(("cross_entropy",), 5, **{"sc_headroom.q50": 1.0})
    return columns


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_findings_do_not_depend_on_cuts(data: st.DataObject) -> None:
    """Oracle: invariance. Any cuts, with the state saved as strict JSON and restored at any of them, change nothing."""
    columns = awkward(np.random.default_rng(data.draw(st.integers(0, 2**32 - 1))), 400)
    rules = RULES | {"limit": replace(LIMIT, hold=2)}
    whole = fold(rules, columns, size=400)
    cuts = sorted(data.draw(st.sets(st.integers(1, 399), max_size=25)))
    engine = Engine(rules, {})
    for first, last in zip([0, *cuts], [*cuts, 400], strict=True):
        engine.feed(cut(columns, first, last))
        if data.draw(st.booleans()):
            engine = Engine(rules, {}, state=json.loads(json.dumps(engine.state(), allow_nan=False)))
    assert whole.findings()
    # by their text: NaN differs from itself
    assert repr(engine.findings()) == repr(whole.findings())
    assert engine.unjudged() == whole.unjudged()


@pytest.mark.parametrize("name", ["softmax_collapse", "sgd_batch8"])
@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 7, 64, 999])
def test_recorded_findings_do_not_depend_on_cuts(name: str, size: int) -> None:
    """Oracle: invariance. The same for real series."""
    columns = recorded(name)
    assert repr(fold(RULES, columns, size).findings()) == repr(fold(RULES, columns, end(columns)).findings())


def test_hash() -> None:
    """Oracle: definition. The hash names what decides: a threshold changes it, a second reading does not."""
    assert rules_hash(RULES) == rules_hash(dict(RULES))
    spike = RULES["loss_spike"]
    other = replace(spike, params=(Param("sigmas", 7, "1", "a test"), *spike.params[1:]))
    assert rules_hash(RULES | {"loss_spike": other}) != rules_hash(RULES)
    assert rules_hash({"limit": LIMIT}) != rules_hash({})


def test_hash_knows_what_rules_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: planted change. Another helper of the rules is another hash: what is stored was found without it."""
    before = rules_hash(RULES)
    (tmp_path / "_shared.py").write_text("LIMIT = 2")
    monkeypatch.setattr(monitor.rules, "__path__", [*monitor.rules.__path__, str(tmp_path)])
    assert rules_hash(RULES) != before


def test_order() -> None:
    """Oracle: definition. By step, then site, then module; gradients break from the end of the model."""
    columns = [column("grad_norm.nonfinite", [[0, 0], [1, 1]], ("a", "b")), column("loss.value", [1.0, nan])]
    found = fold(RULES, columns).findings()
    assert [(f.site, f.module) for f in found] == [("loss", ""), ("gradient", "b"), ("gradient", "a")]
    assert found == sorted(found, key=place)


def test_cost() -> None:
    """Oracle: budget. 90 parameters in blocks of 50 steps stay within five times the target of 60 µs a step."""
    rng = np.random.default_rng(0)
    names = tuple(f"layer{i}.weight" for i in range(90))

    def some(ref: str, modules: tuple[str, ...]) -> ColumnBlock:
        metric, name = ref.split(".")
        x = np.exp(0.1 * rng.standard_normal((1000, len(modules))))
        return ColumnBlock(metric, name, np.arange(1000), modules, x, np.ones(x.shape, dtype=np.bool_))

    columns = [
        some(n, names) for r in RULES.values() for n in r.needs if n.split(".")[0] in ("grad_norm", "spam_spike")
    ]
    columns += [some(n, names) for n in ("update_ratio.update_norm", "param_norm.norm")]
    columns += [
        some("loss.value", ("",)),
        some("input_rms.rms", ("input[0]",)),
        some("input_rms.nonfinite", ("input[0]",)),
    ]
    columns = list({c.ref: c for c in columns}.values())
    for c in columns:
        if c.column == "nonfinite":
            c.values[:] = 0
    engine = Engine(RULES, {})
    pieces = [cut(columns, t, t + 50) for t in range(0, 1000, 50)]
    begin = process_time()
    for piece in pieces:
        engine.feed(piece)
    assert (process_time() - begin) / 1000 < 300e-6
