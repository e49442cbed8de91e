"""What large runs may not do: lose large blocks, read what nobody asks for, read again what has not changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from monitor.store import layout
from monitor.store.find import find_runs
from monitor.store.parts import Part
from monitor.store.process import this_process
from monitor.store.run import open_run
from monitor.store.summary import SummaryFile
from monitor.store.writer import RunWriter
from tests.store.kit import Recorder, make_layout, read_back, same


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[type, str], list[Any]]:
    """Writes down the first argument of each call of a method."""

    def count(kind: type, name: str) -> list[Any]:
        seen: list[Any] = []
        real = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda first, *a, **kw: seen.append(first) or real(first, *a, **kw))
        return seen

    return count


def test_block_larger_than_what_is_held(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: planted fault (a block of more values than are held while the disk refuses). It is written, not lost."""
    monkeypatch.setattr("monitor.store.writer.FLUSH_VALUES", 30)
    monkeypatch.setattr("monitor.store.writer.KEEP_VALUES", 60)
    recorder = Recorder(RunWriter.create(folder, script="t.py"), make_layout([f"m{i}" for i in range(40)]), every=10)
    for step in range(35):
        recorder.step(step)
    assert recorder.writer.lost_values == 0
    assert len(layout.names(folder, layout.LIVE)) == 3
    recorder.close()
    run = open_run(folder)
    assert run.warnings == [] and same(read_back(run), recorder.recorded)


@pytest.mark.usefixtures("small")
def test_opened_again_reads_what_is_new(folder: Path, counted: Callable[[type, str], list[Any]]) -> None:
    """Oracle: invariance, counts. A run that grew tells the same as one opened afresh; old parts are not read again."""
    recorder = Recorder(RunWriter.create(folder, script="t.py"), make_layout())
    for step in range(300):
        recorder.step(step)
    run = open_run(folder)
    refs = [f"{metric}.{column}" for metric, columns in run.metrics().items() for column in columns]
    for ref in refs:
        run.summary(ref)
    parts = {*run._files}
    for step in range(300, 312):
        recorder.step(step)
    opened, read, summaries = counted(Part, "open"), counted(Part, "read"), counted(SummaryFile, "_group")
    again = open_run(folder, run)
    new = {*again._files} - parts
    assert [*opened] == [p.path for p in new] and len(new) == 1
    found = {ref: again.summary(ref) for ref in refs}
    assert {*read} == new and summaries == []
    fresh = open_run(folder)
    for ref, several in found.items():
        for a, b in zip(several, fresh.summary(ref), strict=True):
            assert (a.n, a.first, a.last, a.min, a.max, a.mean) == (b.n, b.first, b.last, b.min, b.max, b.mean)
            assert a.quantiles == b.quantiles and a.band.steps.tolist() == b.band.steps.tolist()
    recorder.close()
    assert same(read_back(open_run(folder, again)), recorder.recorded)


@pytest.mark.usefixtures("small")
def test_another_run_in_its_place_is_read(folder: Path) -> None:
    """Oracle: planted fault (the folder was emptied and recorded anew). Nothing of the old run is taken over."""
    told = []
    run = None
    for shift in (0, 1000):
        for file in sorted(folder.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        recorder = Recorder(RunWriter.create(folder, script="t.py"), make_layout())
        for step in range(100):
            recorder.step(step, {0: float(step + shift)})
        recorder.close()
        run = open_run(folder, run)
        told.append(run.summary("t_whole.value")[0].max)
    assert told == [99.0, 1099.0]


def test_many_series_are_checked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: counts, planted fault. run.json is not checked series by series; one that is wrong is found."""
    calls = [0]
    real = layout._fault

    def counting(*args: Any) -> str | None:
        calls[0] += 1
        return real(*args)

    monkeypatch.setattr(layout, "_fault", counting)
    info = layout.new_info("t.py", this_process())
    info["series"] = [["m", "c", f"x{i}"] for i in range(5000)]
    layout.write_info(tmp_path, info)
    layout.read_info(tmp_path)
    assert calls[0] < 100
    faults: list[Any] = [["m", "c"], ["m", "c", 3], "mcx"]
    for wrong in faults:
        info["series"][4000] = wrong
        layout.write_info(tmp_path, info)
        with pytest.raises(layout.RunFormatError, match=r"series\[4000\]"):
            layout.read_info(tmp_path)


def test_one_run_is_found_unread(finished: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: counts. Where there is one run there is no order, and nothing is read to find it."""
    read: list[Path] = []
    monkeypatch.setattr(layout, "read_info", read.append)
    assert find_runs(finished.writer.path) == [finished.writer.path] and read == []
