"""When curvature is measured, and options that make no sense."""

from __future__ import annotations

from typing import Any

import pytest

from monitor.errors import UsageError
from monitor.probes.curvature import GUESS, Curvature


@pytest.mark.parametrize("factor", [0.3, 1.0, 4.0])
def test_time_stays_inside_the_budget(factor: float) -> None:
    """Oracle: naive simulation. Whatever measurements really cost, the share is kept but for the first guess."""
    curvature, step, spent = Curvature(budget=0.05), 0.01, 0.0
    cost = {kind: factor * steps * step for kind, steps in GUESS.items()}
    kinds: list[str] = []
    for n in range(10, 60_000):
        if curvature.affordable(n * step, step, spent, None):
            now = curvature._now
            kind = now.planned or ""
            kinds.append(kind)
            spent += cost[kind]
            now.seconds[kind] = cost[kind]
            if kind == "batch":
                now.between += cost[kind]
            else:
                now.measured += 1
            assert spent <= 0.05 * n * step * max(1, factor) + 1e-9
    assert 0.9 * 0.05 < spent / (60_000 * step) <= 0.05
    assert set(kinds) == {"batch", "sharpness", "full"}
    assert kinds.count("sharpness") == pytest.approx(7 * kinds.count("full"), abs=7)


def test_a_run_too_short_for_the_sharpness_says_so() -> None:
    """Oracle: definition. The expected time, until a sharpness was measured."""
    curvature = Curvature(budget=0.05)
    now = curvature._now
    assert curvature.unmet() is None
    assert curvature.affordable(10.0, 0.01, 0.0, None) and now.planned == "batch"
    now.between = now.seconds["batch"] = 0.1
    assert not curvature.affordable(10.0, 0.01, 0.45, None)
    assert "takes about 1 s, more than 5%" in (curvature.unmet() or "")
    now.measured = 1
    assert curvature.unmet() is None


@pytest.mark.parametrize(
    "wrong", [{"every": 0}, {"budget": 0.0}, {"budget": 5}, {"top": 0}, {"mode": "test"}, {"landscape": 0}]
)
def test_wrong_options_are_named(wrong: dict[str, Any]) -> None:
    """Oracle: planted fault."""
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Curvature(**wrong)
