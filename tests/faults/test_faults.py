"""Faults that people reported: what monitor says of each is what is stored, and so the published figures are true.

The outcomes are kept whatever they are: a rule that names one more cause, or cries wolf, changes them, and
``python -m tests.faults --write`` writes them anew with the table.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from scipy.stats import binomtest

from monitor.rule import load_rules
from tests.faults import benchmarks, judge, reports
from tests.faults.__main__ import FOLDER
from tests.faults.kit import CASES

assert benchmarks and reports  # they fill the table
STORED: dict[str, list[str]] = json.loads((FOLDER / "outcomes.json").read_text())
#: Drawn once, of all cases alike.
SAMPLE = random.Random(5).sample(sorted(CASES), 4)


def _check(name: str, folder: Path) -> None:
    outcome = judge.judge(CASES[name], folder)
    assert [outcome.faulty, outcome.head, *outcome.alarms] == STORED[name]


@pytest.mark.parametrize("name", SAMPLE)
def test_outcome(name: str, tmp_path: Path) -> None:
    """Oracle: golden. A sample of the reported faults and their repaired twins."""
    _check(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(CASES) - set(SAMPLE)))
def test_all_outcomes(name: str, tmp_path: Path) -> None:
    """Oracle: golden. All others."""
    _check(name, tmp_path)


def test_the_table_is_whole() -> None:
    """Oracle: invariance. Every case has a cause, every cause its rules, every case an outcome in file and page."""
    assert {c for case in CASES.values() for c in case.causes} == set(judge.CAUSES)
    assert set().union(judge.SYMPTOMS, *judge.CAUSES.values()) <= set(load_rules())
    assert set(STORED) == set(CASES)
    page = (FOLDER / "RESULTS.md").read_text().splitlines()
    for name, (faulty, *_) in STORED.items():
        (row,) = (line for line in page if line.startswith((f"| [{name}](", f"| {name} |")))
        assert f"| {faulty} |" in row


@pytest.mark.parametrize(("k", "n"), [(0, 1), (0, 48), (17, 48), (48, 48), (3, 96)])
def test_wilson(k: int, n: int) -> None:
    """Oracle: independent library. The interval is scipy's."""
    interval = binomtest(k, n).proportion_ci(method="wilson")
    assert judge.wilson(k, n) == pytest.approx((interval.low, interval.high), abs=1e-6)
