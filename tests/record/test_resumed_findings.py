"""What was found in earlier attempts is kept when a run goes on, and nobody has to judge those again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from monitor.block import Layout, RawBlock, Segment
from monitor.diagnosis.engine import Engine
from monitor.diagnosis.report import report
from monitor.record.flush import Flusher
from monitor.record.ring import BLOCK_VALUES, COPY_EVERY, Ring
from monitor.store.run import open_run
from monitor.store.writer import RunWriter

LAYOUT = Layout(0, (Segment("loss", ("value", "micro_steps"), ("",), 0),))


def attempt(folder: Path, spike: int) -> None:
    """200 more steps, of which one has a spike."""
    writer = RunWriter.create(folder, script="t.py", resume=True)
    flusher = Flusher(writer, lambda line: None)
    flusher.layout(LAYOUT)
    rng = np.random.default_rng(0)
    steps = np.arange(writer.start_step, writer.start_step + 200)
    loss = 1 + 0.01 * rng.standard_normal(200)
    loss[spike] = 50
    flusher.take(RawBlock(LAYOUT, steps, np.stack([loss, np.ones(200)], axis=1).astype(np.float32)))
    assert flusher.close("finished", None)


def test_findings_of_earlier_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: counts, invariance (folding everything again). Of three attempts nothing is fed to a rule when read."""
    for spike in (150, 160, 170):
        attempt(tmp_path / "a", spike)
    run = open_run(tmp_path / "a")
    stored = run.stored_findings()
    assert stored is not None and stored.state["attempts"] == [0, 1, 2]
    assert {(f.attempt, f.first_step) for f in stored.findings if f.rule == "loss_spike"} == {
        (0, 150),
        (1, 360),
        (2, 570),
    }
    again = report(run, recompute=True)
    fed = []
    monkeypatch.setattr(Engine, "feed", lambda self, blocks: fed.append(self))
    assert report(run) == again and fed == []


def test_block_of_very_many_tensors_is_short() -> None:
    """Oracle: closed form. A block holds no more values than it may, and never fewer rows than are copied together."""
    ring = Ring(torch.device("cpu"), 100)
    for name, number in (("few", 10), ("many", 99_990), ("very_many", 900_000)):
        ring.widen(name, ("value",), [str(i) for i in range(number)])
        assert ring.capacity == max(COPY_EVERY, min(100, BLOCK_VALUES // ring.layout.size))
    assert ring.capacity == COPY_EVERY
