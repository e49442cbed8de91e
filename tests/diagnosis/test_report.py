"""The diagnosis of runs on disk: stored findings, continued or computed afresh."""

from __future__ import annotations

import json
from dataclasses import replace
from math import sin
from pathlib import Path
from typing import Any

import pytest

import monitor.diagnosis.report as report_module
from monitor.block import ColumnBlock
from monitor.diagnosis.engine import Engine, rules_hash
from monitor.diagnosis.finding import Verdict
from monitor.diagnosis.report import describe, report
from monitor.rule import load_rules
from monitor.store.run import open_run
from monitor.store.writer import RunWriter
from tests.rules.series import column, cut, recorded

RULES = load_rules()


def record(
    folder: Path, columns: list[ColumnBlock], until: int = 2001, state: dict[str, Any] | None = None, **create: Any
) -> Engine:
    """Write a run whose recorder stored its findings at step ``until`` and died later."""
    writer = RunWriter.create(folder, script="train.py", **create)
    engine = Engine(RULES, {}, attempt=writer.attempt, state=state)
    writer.append(columns)
    engine.feed(cut(columns, 0, until))
    writer.findings(engine.findings(), engine.state(), rules_hash(RULES))
    writer.close("finished")
    return engine


def text(v: Verdict) -> str:
    """Everything in it; NaN differs from itself, its text does not."""
    return repr(v)


@pytest.mark.parametrize("until", [0, 700, 1500, 1910, 2001])
def test_stored_findings_are_continued(tmp_path: Path, until: int) -> None:
    """Oracle: invariance. Stored at any step and continued, or folded afresh, the verdict is the same."""
    record(tmp_path / "run", recorded("softmax_collapse"), until)
    run = open_run(tmp_path / "run")
    told = report(run)
    assert text(told) == text(report(run, recompute=True))
    assert told.text.startswith("Softmax collapse in steps 1,479–1,904; it led to gradient spike")
    assert run.verdict() == told


def test_live_and_stored_findings_are_the_same(tmp_path: Path) -> None:
    """Oracle: invariance. Runs store float32; what was found live in float64 columns has the same numbers."""
    wave = [2.5 + 0.05 * sin(2.4 * t) for t in range(150)]
    engine = record(tmp_path / "run", [column("loss.value", [*wave, 10 / 3, *wave])])
    assert engine.findings() == [f for i in report(open_run(tmp_path / "run"), True).incidents for f in i.findings]


def test_small_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: invariance. A run that does not fit the memory is folded in pieces."""
    record(tmp_path / "run", recorded("softmax_collapse"), 0)
    run = open_run(tmp_path / "run")
    whole = report(run, recompute=True)
    monkeypatch.setattr(report_module, "_VALUES", 1)
    assert text(report(run, recompute=True)) == text(whole)


def test_findings_of_other_rules_are_not_believed(tmp_path: Path) -> None:
    """Oracle: planted fault. A stored finding goes if the rules' hash, the attempts or the state do not fit."""
    folder = tmp_path / "run"
    record(folder, [column("loss.value", [1.0] * 50)])
    engine = Engine(RULES, {})
    engine.feed([column("loss.value", [1.0] * 30 + [9.0])])
    (planted,) = engine.findings()
    state = engine.state()
    for wrong in (
        (state, "0123456789abcdef"),
        (state | {"attempts": [1], "attempt": 1}, rules_hash(RULES)),
        ({"some": "thing"}, rules_hash(RULES)),
        (state | {"history": []}, rules_hash(RULES)),
        (state | {"closed": [{"rule": 3}]}, rules_hash(RULES)),
        (state | {"episodes": [state["episodes"][0] | {"site": "nowhere"}]}, rules_hash(RULES)),
        (state | {"episodes": [state["episodes"][0] | {"first_step": "1"}]}, rules_hash(RULES)),
        (
            state | {"history": {"loss.value": {"modules": [""], "steps": "?", "values": "", "has": ""}}},
            rules_hash(RULES),
        ),
    ):
        again = RunWriter.create(tmp_path / "other", script="train.py")
        again.append([column("loss.value", [1.0] * 50)])
        again.findings([planted], *wrong)
        again.close("finished")
        assert report(open_run(again.path)).incidents == ()
    assert report(open_run(folder)).level == "healthy"


def test_attempts(tmp_path: Path) -> None:
    """Oracle: definition. Findings of every attempt, whether the recorder went on from the first's state or not."""
    folder = tmp_path / "run"
    first = [column("loss.value", [1.0] * 30 + [9.0] + [1.0] * 30)]
    again = [column("loss.value", [1.0] * 30 + [9.0] + [1.0] * 30, steps=range(40, 101))]
    engine = record(folder, first)
    record(folder, again, resume=True, start_step=40)
    wanted = [(0, 30), (1, 70)]
    assert [(f.attempt, f.first_step) for f in open_run(folder).findings()] == wanted
    other = tmp_path / "other"
    record(other, first)
    record(other, again, resume=True, start_step=40, state=json.loads(json.dumps(engine.state())))
    assert [(f.attempt, f.first_step) for f in open_run(other).findings()] == wanted


def test_empty(tmp_path: Path) -> None:
    """Oracle: definition. A run without a step is no healthy run."""
    RunWriter.create(tmp_path / "run", script="train.py").close("finished")
    assert report(open_run(tmp_path / "run")).level == "not_enough_evidence"


@pytest.mark.parametrize("facts", [{"parameters": "x"}, {"parameters": [3]}, {"optimizers": 1, "parameters": [{}]}])
def test_damaged_facts(facts: dict[str, Any]) -> None:
    """Oracle: planted fault. Facts of the wrong shape cost the audit its decision and nothing else."""
    engine = Engine(RULES, facts)
    engine.feed([column("loss.value", [1.0] * 30 + [9.0])])
    assert [f.rule for f in engine.findings()] == ["loss_spike"]
    assert "unoptimized_parameter" in engine.unjudged()


def test_describe() -> None:
    """Oracle: golden. Message, other numbers, threshold, source; and something readable for what is not known."""
    engine = Engine(RULES, {})
    engine.feed([column("input_rms.rms", [1.0] * 50 + [100.0], ("x",))])
    (f,) = engine.findings()
    assert describe(f) == (
        "x was 100 times its usual size: rms 100, median 1. Z inf; threshold 8 times the median "
        "(own choice: 8 bits instead of 5, ×10 and ×255 mistakes all exceed it)."
    )
    assert describe(replace(f, evidence={})) == (
        "Input jump: 100. Threshold 8 times the median "
        "(own choice: 8 bits instead of 5, ×10 and ×255 mistakes all exceed it)."
    )
    assert describe(replace(f, rule="gone", evidence={"rms": 3.0})) == "Input jump. Rms 3, value 100; threshold 8."
    hostile = replace(f, rule="unoptimized_parameter", module="{0.__class__}\x1b[31m")
    assert describe(hostile, RULES["unoptimized_parameter"]).startswith("{0.__class__}\x1b[31m (100 elements)")
