"""What is printed of many trainings in one script: little, and nothing of what is wrong is left out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import monitor
from monitor.diagnosis.finding import Verdict
from monitor.record.attach import close_all
from monitor.record.launcher import _Finder
from monitor.record.told import TOLD, Told


def trained(finder: _Finder, forgotten: list[bool]) -> None:
    """A small training for each; of some the optimizer has not all parameters."""
    for forget in forgotten:
        model = nn.Linear(3, 1)
        optimizer = torch.optim.SGD(list(model.parameters())[:1] if forget else model.parameters(), 0.01)
        for _ in range(6):
            optimizer.zero_grad()
            model(torch.ones(2, 3)).square().sum().backward()
            optimizer.step()
    finder.stop()
    close_all()
    finder.sum_up()


def test_of_many_trainings_the_wrong_ones_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: planted fault. Of seven runs the fifth is wrong: three, that one and the sum are told; all are there."""
    monkeypatch.chdir(tmp_path)
    trained(_Finder(Path("runs/out"), [], 1), [False] * 4 + [True] + [False] * 2)
    said = capsys.readouterr().err
    assert said.count("monitor: recording 2 tensors") == TOLD
    assert said.count("No problem found") == TOLD
    assert said.count("▲ WARNING ·") == 1
    assert said.endswith(
        "monitor: 7 trainings recorded: 6 ● HEALTHY, 1 ▲ WARNING\n"
        "  monitor inspect runs\n  monitor inspect runs/out-5\n"
    )
    runs = [monitor.open(Path("runs") / ("out" if i == 1 else f"out-{i}")) for i in range(1, 8)]
    assert [r.steps for r in runs] == [6] * 7
    assert [r.verdict().level for r in runs].index("warning") == 4


def test_of_few_trainings_all_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: definition. Three runs are three verdicts, and no sum."""
    trained(_Finder(tmp_path / "out", [], 1), [False] * TOLD)
    said = capsys.readouterr().err
    assert said.count("No problem found") == TOLD
    assert "recorded:" not in said


def test_trouble_that_is_the_same_everywhere_is_not_told_again(capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: closed form. Of ten in trouble three are told, and of sound ones between them three."""
    told = Told()
    levels = ("critical", "healthy", "warning", "healthy") * 5
    for _ in levels:
        told.begins()
    printed = [told.ends(Verdict(level, "", ()), f"runs/{i}") for i, level in enumerate(levels)]
    assert printed == [True] * 6 + [False] * 14
    told.sum_up("runs")
    counts = "10 ● HEALTHY, 5 ▲ WARNING, 5 ■ CRITICAL"
    expected = f"\nmonitor: 20 trainings recorded: {counts}\n  monitor inspect runs\n  monitor inspect runs/0\n"
    assert capsys.readouterr().err.endswith(expected)
