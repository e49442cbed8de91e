"""Every rule on its own cases, on recorded healthy trainings, and on two recorded faults."""

from __future__ import annotations

import importlib
import math
import string
import sys
from pathlib import Path

import numpy as np
import pytest

import monitor.rules
from monitor.diagnosis.engine import Engine
from monitor.diagnosis.report import describe
from monitor.diagnosis.verdict import verdict
from monitor.metric import load_metrics
from monitor.rule import load_rules
from tests.rules.series import HEALTHY, Case, column, end, fold, places, recorded

RULES = load_rules()
CASES = [(rule, case) for rule in RULES for case in importlib.import_module(f"tests.rules.{rule}").CASES]


@pytest.mark.parametrize("size", [1, 50, 10_000])
@pytest.mark.parametrize(("rule", "case"), CASES, ids=[f"{r}: {c.why}" for r, c in CASES])
def test_case(rule: str, case: Case, size: int) -> None:
    """Oracle: planted fault. Series by formula; module and first step of every finding are worked out by hand."""
    engine = fold({rule: RULES[rule]}, case.columns, size, case.facts)
    found = engine.findings()
    assert places(found) == list(case.found)
    assert {f.severity for f in found} <= {case.severity or RULES[rule].severity}
    assert not engine.unjudged() or not found
    for f in found:
        assert describe(f).endswith(").")


@pytest.mark.parametrize("rule", RULES)
def test_cases_are_complete(rule: str) -> None:
    """Oracle: the house rule that every rule has a firing, near-miss, gaps, constant and non-finite case."""
    cases = importlib.import_module(f"tests.rules.{rule}").CASES
    assert any(c.found for c in cases)
    for kind in ("near miss", "gaps", "constant", "non-finite"):
        assert any(c.why.startswith(kind) for c in cases), kind


@pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
def test_definition(rule: monitor.Rule) -> None:
    """Oracle: definition. Needs are columns that exist, and remedies can be imported."""
    metrics = load_metrics()
    for need in rule.needs:
        metric, name = need.split(".")
        assert not metrics[metric].derived
        assert metrics[metric].column(name)
    for remedy in rule.remedies:
        if remedy.import_path:
            module, _, attribute = remedy.import_path.rpartition(".")
            assert hasattr(importlib.import_module(module), attribute)
    assert all(name for _, name, _, _ in string.Formatter().parse(rule.message) if name is not None)


@pytest.mark.parametrize("name", HEALTHY)
def test_no_false_alarm(name: str) -> None:
    """Oracle: planted fault, absent. Recorded healthy trainings give no warning."""
    found = fold(RULES, recorded(name)).findings()
    assert [f for f in found if f.severity != "info"] == []


def test_softmax_collapse_of_a_real_training() -> None:
    """Oracle: recorded golden. The recipe collapses between 1,440 and 1,600 and explodes near 1,900."""
    columns = recorded("softmax_collapse")
    engine = fold(RULES, columns)
    told = verdict(engine.findings(), engine.unjudged(), end(columns))
    assert told.level == "critical"
    (incident,) = told.incidents
    assert incident.head.rule == "softmax_collapse"
    assert 1440 <= incident.head.first_step <= 1600
    (diverged,) = [f for f in incident.consequences if f.rule == "divergence"]
    assert 1890 <= diverged.first_step <= 1930
    assert diverged.evidence["accuracy"] < 0.9
    assert told.text.startswith("Softmax collapse in steps 1,4")
    assert "; it led to gradient spike" in told.text and "divergence at step 1,9" in told.text


def test_input_jump_of_a_real_training() -> None:
    """Oracle: recorded golden. Inputs ×100 at step 200: the input comes first, then the spikes, first layer first."""
    columns = recorded("input_jump")
    engine = fold(RULES, columns)
    told = verdict(engine.findings(), engine.unjudged(), end(columns))
    (incident,) = told.incidents
    assert [(f.rule, f.module, f.first_step) for f in incident.findings] == [
        ("input_jump", "input[0]", 200),
        ("loss_spike", "", 200),
        ("gradient_spike", "0.weight", 200),
        ("gradient_spike", "2.weight", 200),
    ]
    assert told.text == (
        "Input jump in input[0] at step 200; "
        "it led to loss spike and gradient spike (0.weight and 1 more) at the same step."
    )


@pytest.mark.parametrize("size", [1, 50, 10_000])
def test_a_raised_learning_rate_is_named(size: int) -> None:
    """Oracle: planted fault. A rate times 100 for one step is named in the spike after it, and in no later one."""
    loss = [2.0 + 0.05 * math.sin(2.4 * t) for t in range(400)]
    loss[151] = loss[300] = 9.0
    rates = [[1e-3, 1e-4] for _ in loss]
    rates[150] = [1e-3, 1e-2]
    columns = [column("loss.value", loss), column("learning_rate.lr", rates, ("group[0]", "group[1]"))]
    columns.append(column("grad_norm.norm", loss, ("w",)))
    found = {(f.rule, f.first_step): f for f in fold(RULES, columns, size).findings()}
    assert found["loss_spike", 151].evidence["learning_rate_factor"] == pytest.approx(100)
    assert "earning rate factor 100" in describe(found["loss_spike", 151])
    assert "learning_rate_factor" not in found["loss_spike", 300].evidence


RULE_FILE = '''
"""The loss is above a limit.

What it means: a test. How it is decided: value > limit. What to do: nothing. When it is wrong: never.
"""

from monitor.rule import Hits, Param, Remedy, Rule


def check(window, p):
    block = window["loss.value"]
    value, has = block["loss.value"], block.has("loss.value")
    yield Hits(block.steps, block.modules, has & (value > p["limit"]), has, value, p["limit"])


RULE = Rule(
    id="zz_loss_limit", title="High loss", severity="info", site="loss", message="The loss is {value:.1f}.",
    refute="nothing", remedies=(Remedy("nothing"),), params=(Param("limit", 2, "loss", "a test"),),
    needs=("loss.value",), check=check, doc=__doc__,
)
'''


def test_a_rule_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: planted file. A file in a folder on the package's path is loaded, applied, described; that is all."""
    (tmp_path / "zz_loss_limit.py").write_text(RULE_FILE)
    monkeypatch.setattr(monitor.rules, "__path__", [*monitor.rules.__path__, str(tmp_path)])
    try:
        rules = load_rules()
        assert set(rules) == {*RULES, "zz_loss_limit"}
        engine = Engine(rules, {})
        engine.feed([column("loss.value", [1.0, 3.0, 1.0])])
        (found,) = engine.findings()
        assert (found.rule, found.first_step, found.count) == ("zz_loss_limit", 1, 1)
        assert describe(found) == "The loss is 3.0. Threshold 2 loss (a test)."
        told = verdict(engine.findings(), engine.unjudged(), 3)
        assert told.text == "No problem found in 3 steps; worth knowing: high loss at step 1."
    finally:
        sys.modules.pop("monitor.rules.zz_loss_limit", None)


def test_adam_on_a_noisy_quadratic() -> None:
    """Oracle: naive transcription of the paper. Gradient noise with 50 of 1,000 elements at ±1000, as in SPAM."""
    rng = np.random.default_rng(0)
    v, norm, largest, ratio = np.zeros(1000), [], [], []
    for step in range(601):
        g = rng.standard_normal(1000)
        if step and step % 200 == 0:
            g[rng.choice(1000, 50, replace=False)] = 1000 * rng.choice([-1, 1], 50)
        norm.append(float(np.linalg.norm(g)))
        largest.append(float(np.abs(g).max()))
        ratio.append(float((g**2 / (v / (1 - 0.999**step))).max()) if step else None)
        v = 0.999 * v + 0.001 * g**2
    columns = [column("grad_norm.norm", norm, ("x",)), column("grad_norm.max_abs", largest, ("x",))]
    columns.append(column("spam_spike.ratio", ratio, ("x",)))
    found = fold({"gradient_spike": RULES["gradient_spike"]}, columns).findings()
    assert places(found) == [("x", 200), ("x", 400), ("x", 600)]


@pytest.mark.parametrize("kind", ["normal", "log-normal", "exponential", "drifting"])
def test_noise(kind: str) -> None:
    """Oracle: planted fault, absent. 20,000 points of noise without a fault, as loss, gradient and input at once."""
    rng = np.random.default_rng(1)
    n = 20_000
    trend = 2 + 8 * np.exp(-np.arange(n) / 3000)
    noise = {
        "normal": trend * (1 + 0.03 * rng.standard_normal(n)),
        "log-normal": trend * np.exp(rng.standard_normal(n)),
        "exponential": rng.exponential(1, n),
        "drifting": trend + np.convolve(0.05 * rng.standard_normal(n), 0.95 ** np.arange(100))[:n],
    }
    values = noise[kind].tolist()
    columns = [column("loss.value", values), column("train_accuracy.accuracy", [0.5] * n, ("cross_entropy",))]
    columns += [column("grad_norm.norm", values, ("w",)), column("input_rms.rms", values, ("input[0]",))]
    assert fold(RULES, columns, 5000).findings() == []
