"""Kill, fork, fill the disk, read beside the writer: what was finished is there, once, and training never notices."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pytest

from monitor.store import process
from monitor.store.run import Run, open_run
from monitor.store.writer import RunWriter
from tests.store.kit import Recorder, make_layout, read_back, same, series_of, value_at


@contextlib.contextmanager
def endless(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A process that records into ``folder`` until the body ends, and the file in which it says how far it is."""
    progress = folder.with_name("progress")
    progress.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.store.endless", str(folder), str(progress)]
    child = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    try:
        while not progress.exists() or progress.stat().st_size < 8:
            assert child.poll() is None
            time.sleep(0.002)
        yield child, progress
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()


def check(run: Run, refs: bool = True) -> None:
    """Every step once, from the first to the last, with the values of its own."""
    last = run.last_step
    assert last is not None and run.first_step == 0
    for place, (ref, module) in enumerate(series_of(make_layout()) if refs else [("t_whole.value", "")]):
        steps, values = run.series(ref, module)
        assert steps.tolist() == list(range(len(steps))) and len(steps) >= last + 1
        np.testing.assert_array_equal(values, [value_at(s, place) for s in steps])


def check_glob(folder: Path) -> int:
    """A user's own pattern, and a data set of the folder, count nothing twice; returns the number of rows."""
    import duckdb

    pattern = str(folder / "rank0" / "series" / "*.parquet")
    if not list((folder / "rank0" / "series").glob("*.parquet")):
        return 0
    ((n, distinct),) = duckdb.execute(f"select count(*), count(distinct (series, step)) from '{pattern}'").fetchall()
    assert n == distinct
    table = ds.dataset(folder / "rank0" / "series", format="parquet").to_table(columns=["series", "step"])
    assert len(set(zip(*(c.to_pylist() for c in table.columns), strict=True))) == table.num_rows >= n
    return n


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_kill(folder: Path, kills: int) -> None:
    """Oracle: planted fault. SIGKILL at any moment, resume, again: no finished step lost, no file unreadable."""
    rng = random.Random(kills)
    for attempt in range(kills):
        with endless(folder) as (child, progress):
            time.sleep(rng.uniform(0.0, 0.35))
            child.send_signal(signal.SIGKILL)
            child.wait()
        (finished,) = struct.unpack("<q", progress.read_bytes())
        run = open_run(folder)
        assert run.last_step in (finished, finished + 1)
        assert (run.status, run.is_live, run.attempts) == ("died", False, attempt + 1)
        assert all("cut off within the last frame" in w for w in run.warnings)
        assert run.steps == run.last_step + 1
        check(run, refs=attempt % 4 == 0)
        check_glob(folder)
    writer = RunWriter.create(folder, script="t.py", resume=True)
    writer.close("finished")
    run = open_run(folder)
    check(run)
    assert check_glob(folder) == 5 * run.steps  # everything stands in large parts now
    assert [a["status"] for a in run.info["attempts"]] == ["died"] * kills + ["finished"]
    rest = {p.relative_to(folder).parts[:2] for p in folder.rglob("*") if p.is_file()}
    assert rest == {("run.json",), ("rank0", "series"), ("rank0", "summary")}


@pytest.mark.parametrize("seconds", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_reader_beside_writer(folder: Path, seconds: float) -> None:
    """Oracle: invariance. Every reading is whole, without error or double count, and never goes back."""
    with endless(folder) as (child, progress):
        end, latest, readings, globbed = time.monotonic() + seconds, 0, 0, 0
        while time.monotonic() < end:
            (finished,) = struct.unpack("<q", progress.read_bytes())
            run = open_run(folder)
            assert run.is_live and run.status == "running" and run.last_step is not None
            assert run.last_step >= max(finished, latest) and run.warnings == []
            latest = run.last_step
            assert run.steps == latest + 1
            if readings % 2:
                time.sleep(0.01)  # so that parts vanish under this reader's hands
            check(run, refs=False)
            if readings % 8 == 0:
                (whole, *_) = run.summary()
                assert whole.n >= latest + 1 == whole.last_step + 1 + (latest - whole.last_step)
                assert (whole.min, whole.max) == (0, whole.last_step) and whole.n == whole.last_step + 1
            if readings % 8 == 4:
                globbed = check_glob(folder)
            readings += 1
        assert child.poll() is None and readings > 5 and globbed > 0


def test_forked_child_changes_nothing(folder: Path) -> None:
    """Oracle: invariance. A worker that inherits the writer, and even closes it, leaves the folder as it is."""
    recorder = Recorder(RunWriter.create(folder, script="t.py"), make_layout(), every=5)
    for step in range(12):
        recorder.step(step)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    child = os.fork()
    if child == 0:
        code = 1
        try:
            recorder.writer.update(warnings=["child"])
            recorder.writer.flush(force=True)
            recorder.writer.findings([], {}, "")
            recorder.close()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    recorder.close()
    assert same(read_back(open_run(folder)), recorder.recorded)


def test_full_disk(folder: Path) -> None:
    """Oracle: planted fault. Under a file size limit nothing raises, loss is counted; with space again it goes on."""
    program = f"""
        import json, resource
        import monitor.store.tail, monitor.store.writer as w
        from tests.store.kit import *
        use_definitions()
        w.FLUSH_STEPS, w.KEEP_VALUES, w.RETRY_SECONDS = 8, 100, 0.0
        monitor.store.tail.RETRY_SECONDS = 0.0
        r = Recorder(w.RunWriter.create({str(folder)!r}, script="t.py"), make_layout())
        problems = []
        for step in range(120):
            if step in (40, 80):
                limit = 200 if step == 40 else resource.RLIM_INFINITY
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            r.step(step)
            problems.append(r.writer.problem)
        r.close()
        print(json.dumps([problems, r.writer.lost_values, r.writer.lost_steps]))
    """
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(program)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    problems, lost, (first, last) = json.loads(done.stdout)
    assert problems[:40] == [None] * 40 and problems[100:] == [None] * 20
    assert any("too large" in str(p) for p in problems[45:80])
    assert lost > 0 and 40 <= first < last < 100
    run = open_run(folder)
    steps, values = run.series("t_whole.value")
    missing = sorted(set(range(120)) - set(steps.tolist()))
    assert values.tolist() == steps.tolist() and lost == 5 * len(missing) and (missing[0], missing[-1]) == (first, last)
    (warning,) = run.warnings
    assert warning.startswith(f"dropped values of attempt 0: {lost} of steps {first} to {last}: ")
    assert not list(folder.rglob("*.tmp"))


def test_unwritable_from_the_start(tmp_path: Path) -> None:
    """Oracle: planted fault. A folder that cannot be made is the caller's to know, as an OSError."""
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(OSError):
            RunWriter.create(folder, script="t.py")


def test_folder_that_becomes_unwritable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: planted fault. Without a place for parts nothing raises, and the tail holds everything."""
    monkeypatch.setattr("monitor.store.writer.FLUSH_STEPS", 8)
    recorder = Recorder(RunWriter.create(folder, script="t.py"), make_layout())
    live = folder / "rank0" / "live"
    live.rmdir()
    live.write_text("a file in the way")
    for step in range(50):
        recorder.step(step)
    assert "values cannot be written: Not a directory" in str(recorder.writer.problem)
    recorder.close()
    assert recorder.writer.lost_values == 0 and recorder.writer.problem
    run = open_run(folder)
    assert same(read_back(run), recorder.recorded) and run.status == "finished" and run.warnings == []
    live.unlink()
    RunWriter.create(folder, script="t.py", resume=True).close("finished")  # the next attempt tidies up
    assert same(read_back(open_run(folder)), recorder.recorded) and not list(folder.glob("rank0/tail/*"))


def test_folder_that_vanishes(folder: Path) -> None:
    """Oracle: planted fault. Somebody deletes the run while it is recorded: nothing raises, everything is counted."""
    recorder = Recorder(RunWriter.create(folder, script="t.py"), make_layout())
    for step in range(30):
        if step == 10:
            shutil.rmtree(folder)
        recorder.step(step)
    recorder.close()
    assert recorder.writer.problem and recorder.writer.lost_values == 5 * 30 and not folder.exists()


def test_retries_once_a_minute(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: closed form. After a failure nothing is tried for 60 seconds; then it goes on, without loss."""
    clock = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    recorder = Recorder(RunWriter.create(folder, script="t.py"), make_layout())
    live = folder / "rank0" / "live"
    live.rmdir()
    for step in range(4):
        recorder.step(step)
    recorder.writer.flush(force=True)
    assert recorder.writer.problem
    live.mkdir()
    clock[0] += 59
    recorder.writer.flush(force=True)
    assert recorder.writer.problem and not list(live.iterdir())
    clock[0] += 2
    recorder.writer.flush(force=True)
    assert recorder.writer.problem is None and len(list(live.iterdir())) == 1
    assert same(read_back(open_run(folder)), recorder.recorded)


def test_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: closed form. This process is, a recycled number or a zombie is not, another host is while it writes."""
    here = process.this_process()
    now = time.time()
    assert process.is_alive(here, 0.0)
    assert not process.is_alive({**here, "started": here["started"] + 1}, now)
    assert process.is_alive({**here, "host": "elsewhere"}, now - 500)
    assert not process.is_alive({**here, "host": "elsewhere"}, now - 700)
    child = subprocess.Popen([sys.executable, "-c", ""])
    started = process._started(child.pid)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # ended, not yet waited for
    assert not process.is_alive({**here, "pid": child.pid, "started": started}, now)
    child.wait()


def test_closing_twice(folder: Path) -> None:
    """Oracle: invariance. The second close, whatever it says, changes nothing."""
    writer = RunWriter.create(folder, script="t.py")
    writer.close("failed", "ValueError: x")
    writer.close("finished")
    info = open_run(folder).info
    assert (info["status"], info["attempts"][0]["error"]) == ("failed", "ValueError: x") and info["ended"]
