"""A run folder gives back what was recorded, wherever the values stand: tail, live parts, large parts."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import monitor.diagnosis.report as report_module
from monitor.diagnosis.finding import Finding, Incident, Verdict
from monitor.errors import RunFormatError, UsageError
from monitor.store.find import find_runs
from monitor.store.run import Run, open_run
from monitor.store.writer import RunWriter
from tests.store.kit import Recorder, make_layout, read_back, same, series_of, value_at

LAYOUTS = (("x", "y"), ("x", "y", "z"), ("z",))
values = st.floats(width=32) | st.sampled_from([float("nan"), float("inf"), float("-inf"), 0.0])
row = st.tuples(st.integers(1, 3), st.integers(0, 2), st.dictionaries(st.integers(0, 2), values, max_size=3))


@pytest.mark.usefixtures("small")
@settings(max_examples=60, deadline=None)
@given(st.lists(row, max_size=60), st.integers(1, 9), st.booleans())
def test_round_trip(rows: list[tuple[int, int, dict[int, float]]], every: int, close: bool) -> None:
    """Oracle: plain dict. Random presence, gaps, layouts, NaN and infinities; closed, or left as a crash leaves it."""
    with tempfile.TemporaryDirectory() as folder:
        writer = RunWriter.create(Path(folder) / "run", script="t.py")
        recorder = Recorder(writer, make_layout(), every)
        step, number = -1, 0
        for gap, layout, some in rows:
            if layout != number:
                number = layout
                recorder.layout(make_layout(LAYOUTS[layout], number))
            step += gap
            recorder.step(step, some)
        if close:
            recorder.close()
        run = open_run(writer.path)
        assert same(read_back(run), recorder.recorded) and run.warnings == []
        assert run.steps == len(rows) and run.last_step == (step if rows else None)
        for s in run.summary():
            expected = recorder.recorded[s.ref, s.module]
            assert (s.n, s.first_step, s.last_step) == (len(expected), min(expected), max(expected))
            assert s.nonfinite == sum(not np.isfinite(v) for v in expected.values())


@pytest.fixture
def recorder(small: None, folder: Path) -> Recorder:
    """400 steps in all kinds of parts, not closed."""
    recorder = Recorder(RunWriter.create(folder, script="t.py"), make_layout())
    for step in range(403):
        recorder.step(step)
    rooms = {room: len(list((folder / "rank0" / room).iterdir())) for room in ("tail", "live", "series", "summary")}
    assert all(rooms.values())
    return recorder


def test_blocks(recorder: Recorder, folder: Path) -> None:
    """Oracle: closed form. Any range of steps and choice of modules; unrecorded modules are empty columns."""
    run = open_run(folder)
    block = run.block("t_pair.b", ["y", "nowhere", "x"], first=95, last=230)
    assert block.names == ("t_pair.b",) and block.modules == ("y", "nowhere", "x")
    assert block.steps.tolist() == list(range(95, 231)) and block["t_pair.b"].dtype == np.float64
    np.testing.assert_array_equal(block["t_pair.b"][:, 0], [value_at(s, 4) for s in range(95, 231)])
    np.testing.assert_array_equal(block["t_pair.b"][:, 2], [value_at(s, 2) for s in range(95, 231)])
    assert block.has("t_pair.b").all(axis=0).tolist() == [True, False, True]
    assert not block.has("t_pair.b")[:, 1].any() and np.isnan(block["t_pair.b"][:, 1]).all()
    steps, values = run.series("t_whole.value")
    assert steps.dtype == np.int64 and values.tolist() == steps.tolist() == list(range(403))
    assert len(run.block("t_whole.value", first=500).steps) == 0


def test_what_there_is(recorder: Recorder, folder: Path) -> None:
    """Oracle: closed form. Recorded metrics, the columns computed from them, modules; unknown names get an answer."""
    run = open_run(folder)
    assert run.metrics() == {"t_whole": ["value"], "t_pair": ["a", "b"]}
    assert run.refs() == ["t_whole.value", "t_pair.a", "t_pair.b", "t_sum.total"]
    assert run.modules("t_pair.a") == run.modules("t_sum.total") == ("x", "y") and run.modules("t_whole.value") == ("",)
    assert run.modules("no.such") == () and run.summary("no.such") == []
    with pytest.raises(UsageError, match=r"no column 'no.such'; there are 't_whole.value', "):
        run.block("no.such")
    with pytest.raises(UsageError, match=r"t_pair.a has no module 'q'; it was recorded for 'x', 'y'"):
        run.series("t_pair.a", "q")
    with pytest.raises(UsageError, match=r"'loss' is not a column; write it as 'metric.column'"):
        run.block("loss")
    with pytest.raises(UsageError, match="nothing of a metric 'no'"):
        run.frame("no")


def test_unrecorded_column_of_a_known_metric(folder: Path) -> None:
    """Oracle: closed form. It is a block without steps and modules, as a rule's window gives it."""
    recorder = Recorder(RunWriter.create(folder, script="t.py"), make_layout())
    recorder.step(0, {0: 1.0})
    block = open_run(folder).block("t_pair.a")
    assert len(block.steps) == 0 and block.modules == () and block["t_pair.a"].shape == (0, 0)
    block = open_run(folder).block("t_sum.total")
    assert len(block.steps) == 0 and block.modules == ()


def test_derived_metric_looks_back(recorder: Recorder, folder: Path) -> None:
    """Oracle: naive. A computed column does not depend on where reading begins, nor on how sparse its needs are."""
    run = open_run(folder)
    whole = run.block("t_sum.total")["t_sum.total"]
    naive = [sum(value_at(s, 3) for s in range(max(0, t - 3), t + 1)) for t in range(403)]
    np.testing.assert_allclose(whole[:, 1], naive, rtol=1e-12)
    for first in (0, 1, 2, 100, 402):
        block = run.block("t_sum.total", ["y"], first=first, last=first + 5)
        np.testing.assert_allclose(block["t_sum.total"][:, 0], naive[first : first + 6], rtol=1e-12)
    (x, y) = run.summary("t_sum.total")
    assert (x.module, y.module, y.n) == ("x", "y", 403) and y.last == pytest.approx(naive[-1], rel=1e-6)
    recorder.close()
    sparse = Recorder(RunWriter.create(folder, script="t.py"), make_layout())
    for step in range(0, 1000, 50):
        sparse.step(step)
    run = open_run(sparse.writer.path)
    steps, values = run.series("t_sum.total", "x")
    block = run.block("t_sum.total", ["x"], first=500)
    np.testing.assert_array_equal(block["t_sum.total"][:, 0], values[steps >= 500])


def test_frame(recorder: Recorder, folder: Path) -> None:
    """Oracle: closed form. One row per step and module where anything was recorded, columns side by side."""
    recorder.step(403, {1: 7.0, 4: 8.0})
    frame = open_run(folder).frame("t_pair")
    assert list(frame.columns) == ["step", "module", "a", "b"] and len(frame) == 2 * 404
    last = frame[frame.step == 403].set_index("module")
    assert last.a["x"] == 7.0 and np.isnan(last.b["x"]) and np.isnan(last.a["y"]) and last.b["y"] == 8.0
    assert open_run(folder).frame("t_sum").shape == (2 * 404 - 1, 3)
    assert list(open_run(folder).frame("t_whole").step) == list(range(403))


def test_sql(recorder: Recorder, folder: Path) -> None:
    """Oracle: closed form. The same values under their names, each once, from parts and tail."""
    run = open_run(folder)
    rows = run.sql(
        'select metric, "column", module, count(*), min(step), max(step), sum(value) from series '
        "group by all order by all"
    ).fetchall()
    expected = [
        (*ref.split("."), module, 403, 0, 402, sum(value_at(s, i) for s in range(403)))
        for i, (ref, module) in enumerate(series_of(make_layout()))
    ]
    assert rows == sorted(expected)


def test_summary_is_that_of_the_values(recorder: Recorder, folder: Path) -> None:
    """Oracle: invariance. Merged from stored summaries, live parts and tail, or from one large part: the same."""
    live = open_run(folder).summary()
    recorder.close()
    closed = open_run(folder).summary()
    assert sorted((s.ref, s.module) for s in live) == sorted(series_of(make_layout()))
    for a, b in zip(live, closed, strict=True):
        _, values = open_run(folder).series(a.ref, a.module)
        for s in (a, b):
            assert (s.n, s.min, s.max, s.first, s.last) == (403, values[0], values[-1], values[0], values[-1])
            assert s.mean == pytest.approx(values.mean()) and s.std == pytest.approx(values.std())
            assert s.quantiles["p50"] == pytest.approx(np.median(values), rel=0.01)
    assert [s.module for s in open_run(folder).summary("t_pair.a")] == ["x", "y"]


def test_summary_without_summary_files(recorder: Recorder, folder: Path) -> None:
    """Oracle: invariance. A missing, damaged or foreign summary is made again from the values."""
    recorder.close()
    before = open_run(folder).summary()
    files = sorted((folder / "rank0" / "summary").iterdir())
    files[0].unlink()
    files[1].write_bytes(files[2].read_bytes())  # of another part
    files[2].write_bytes(b"PAR1")
    for a, b in zip(before, open_run(folder).summary(), strict=True):
        assert (a.n, a.min, a.max, a.first_step, a.last_step) == (b.n, b.min, b.max, b.first_step, b.last_step)


def test_stays_readable(recorder: Recorder, folder: Path) -> None:
    """Oracle: invariance. A run that was opened before its live parts were replaced still reads what it saw then."""
    run = open_run(folder)
    recorded = {k: dict(v) for k, v in recorder.recorded.items()}
    for step in range(403, 600):
        recorder.step(step)
    recorder.close()
    assert not list((folder / "rank0" / "live").iterdir())
    assert same(read_back(run), recorded) and {s.n for s in run.summary()} == {403}
    assert run.sql("select count(*) from series").fetchall() == [(5 * 403,)] and run.warnings == []


def test_threads_share_a_run(recorder: Recorder, folder: Path) -> None:
    """Oracle: plain dict. Sessions of a dashboard read one run at once, also what the tail must be evaluated for."""
    run = open_run(folder)
    with ThreadPoolExecutor(8) as pool:
        several = list(pool.map(lambda _: read_back(run), range(8)))
    assert all(same(some, recorder.recorded) for some in several)


def test_resume(recorder: Recorder, folder: Path) -> None:
    """Oracle: plain dict. A second attempt goes back to step 380; both stay, and history is one line."""
    first = recorder.recorded
    writer = RunWriter.create(folder, script="t.py", resume=True, start_step=380)
    assert (writer.path, writer.attempt, writer.start_step, writer.renamed) == (folder, 1, 380, False)
    again = Recorder(writer, make_layout(("x", "y", "late")), every=3)
    for step in range(380, 395):
        again.step(step, {0: -1.0, 5: step})
    run = open_run(folder)
    for _ in range(2):  # with the first attempt's rows in its tail, and after closing
        assert (run.attempts, run.first_step, run.last_step, run.steps) == (2, 0, 394, 403 + 15)
        assert same(read_back(run, attempt=0), first)
        assert same(read_back(run, attempt=1), again.recorded)
        steps, values = run.series("t_whole.value")
        assert steps.tolist() == list(range(395)) and values.tolist() == [*range(380), *([-1.0] * 15)]
        assert run.series("t_pair.a", "x")[0].tolist() == list(range(380))  # not recorded again, so superseded
        frame = run.frame("t_whole")
        assert list(frame.columns) == ["attempt", "step", "module", "value"] and len(frame) == 403 + 15
        again.close()
        run = open_run(folder)
    assert [a["status"] for a in run.info["attempts"]] == ["died", "finished"]
    # what the first attempt left behind was tidied up as well
    left = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    assert not [p for p in left if "/live/" in p or "/tail/" in p or p.endswith(".tmp")]
    assert open_run(folder).series("t_whole.value")[0].tolist() == list(range(395))


def test_resume_goes_on_after_the_last_step(recorder: Recorder, folder: Path) -> None:
    """Oracle: closed form. Without a step given, after the last recorded one; a new folder begins at 0."""
    assert RunWriter.create(folder, script="t.py", resume=True).start_step == 403
    fresh = RunWriter.create(folder.with_name("new"), script="t.py", resume=True)
    assert (fresh.start_step, fresh.attempt) == (0, 0)


def test_occupied_folder(folder: Path) -> None:
    """Oracle: closed form. An occupied folder is left alone, also an empty one that another process just took."""
    assert not RunWriter.create(folder, script="t.py").renamed
    second = RunWriter.create(folder, script="t.py")
    assert second.path == folder.with_name("run-2") and second.renamed
    folder.with_name("run-3").write_text("a file")
    assert RunWriter.create(folder, script="t.py").path == folder.with_name("run-4")
    folder.with_name("empty").mkdir()
    assert RunWriter.create(folder.with_name("empty"), script="t.py").path == folder.with_name("empty")
    with pytest.raises(UsageError, match="start_step is -1"):
        RunWriter.create(folder, script="t.py", start_step=-1)


def test_chdir_does_not_move_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: planted fault. A script that changes its working directory still records into the same folder."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    recorder = Recorder(RunWriter.create("runs/a", script="t.py"), make_layout())
    monkeypatch.chdir(tmp_path / "elsewhere")
    recorder.step(0)
    recorder.close()
    assert open_run(tmp_path / "runs/a").steps == 1 and list((tmp_path / "elsewhere").iterdir()) == []


def test_update(folder: Path) -> None:
    """Oracle: closed form. Mappings merge, warnings add up, what JSON cannot hold becomes text, the rest is refused."""
    writer = RunWriter.create(folder, script="t.py")
    writer.update(versions={"torch": "2"}, facts={"a": np.float32(0.5), "b": (1, 2), "c": float("nan"), "d": {3}})
    writer.update(versions={"numpy": "1"}, warnings=["w"], overhead={"fraction": 0.01})
    writer.update(absent=[{"what": "x", "why": "y"}])
    writer.update(absent=[])
    writer.update(warnings=["w", "v"], facts={"a": 1})
    info = open_run(folder).info
    assert info["versions"] == {"torch": "2", "numpy": "1"} and info["absent"] == [] and info["warnings"] == ["w", "v"]
    assert info["facts"] == {"a": 1, "b": [1, 2], "c": "NaN", "d": "{3}"} and info["overhead"] == {"fraction": 0.01}
    with pytest.raises(UsageError, match="no open field 'status'"):
        writer.update(status="finished")


def test_tables(folder: Path) -> None:
    """Oracle: invariance. A table comes back as it was; a name that could leave the folder is refused."""
    writer = RunWriter.create(folder, script="t.py")
    table = {
        "eigenvalue": np.array([1.0, np.inf]),
        "since": np.ma.masked_invalid([np.nan, 3.0]),
        "row": np.arange(2, dtype=np.int32),
        "right": np.array([False, True]),
        "text": ["a", "b\ud800"],
    }
    writer.table("spectral_density", 7, table)
    run = open_run(folder)
    assert run.tables() == [("spectral_density", 0, 7)]
    wanted = {
        "eigenvalue": pa.array([1.0, np.inf]),
        "since": pa.array([None, 3.0]),
        "row": pa.array([0, 1], pa.int32()),
        "right": pa.array([False, True]),
        "text": pa.array(["a", "b?"]),
    }
    assert run.table("spectral_density", 7).equals(pa.table(wanted))
    for name in ("../x", "a/b", "A", "", "a-b", "a\x1b"):
        with pytest.raises(UsageError, match="expected a snake_case name"):
            writer.table(name, 7, table)
    with pytest.raises(UsageError, match="no table 'x' of step 7"):
        run.table("x", 7)


FINDING = Finding(
    "r", "t", "warning", "loss", "m\ud800", 0, 3, 9, 4, True, 5, float("inf"), 0.5, {"ratio": float("nan")}, 2
)


def test_stored_findings(folder: Path) -> None:
    """Oracle: invariance. Findings, engine state and rule hash come back; later ones replace earlier ones."""
    writer = RunWriter.create(folder, script="t.py")
    assert open_run(folder).stored_findings() is None
    writer.findings([], {}, "")
    writer.findings([FINDING], {"last_step": 9, "x": float("inf")}, "abc")
    stored = open_run(folder).stored_findings()
    assert stored is not None and stored.rules_hash == "abc" and stored.state == {"last_step": 9, "x": float("inf")}
    (found,) = stored.findings
    assert repr(found) == repr(FINDING).replace("m\\ud800", "m?")
    (folder / "rank0" / "findings.parquet").write_bytes(b"PAR1....PAR1")
    run = open_run(folder)
    assert run.stored_findings() is None and any("findings.parquet cannot be read" in w for w in run.warnings)


def test_verdict_is_asked_for_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: closed form. Verdict, incidents and findings are three views of one report, earliest finding first."""
    late = Finding("r", "t", "warning", "loss", "", 0, 8, 9, 8, True, 2, 1.0, 0.5)
    asked: list[Run] = []

    def report(run: Run) -> Verdict:
        asked.append(run)
        return Verdict("warning", "text", (Incident(late, (), "warning"), Incident(FINDING, (), "warning")))

    monkeypatch.setattr(report_module, "report", report)
    RunWriter.create(folder, script="t.py")
    run = open_run(folder)
    assert run.findings() == [FINDING, late] and [i.head for i in run.incidents()] == [late, FINDING]
    assert run.verdict().level == "warning" and asked == [run]


def test_late_module_stands_where_it_is_executed(folder: Path) -> None:
    """Oracle: closed form. A layer that was thawed late keeps the place that the facts give it."""
    recorder = Recorder(RunWriter.create(folder, script="t.py"), make_layout(("first", "second", "third")))
    recorder.writer.update(facts={"parameters": [{"name": n} for n in ("first", "second", "third")]})
    recorder.step(0, {1: 1.0, 5: 1.0})
    recorder.step(1, {1: 1.0, 3: 1.0, 5: 1.0})
    recorder.close()
    run = open_run(folder)
    assert run.modules("t_pair.a") == ("first", "second", "third")
    assert [s.module for s in run.summary("t_pair.a")] == ["first", "second", "third"]


def test_find_runs(tmp_path: Path) -> None:
    """Oracle: closed form. Newest first, in folders of folders too, no links; a folder of runs is told from a run."""
    for i, name in enumerate(["old", "group/mid", "new"]):
        path = RunWriter.create(tmp_path / name, script="t.py").path / "run.json"
        path.write_text(path.read_text().replace('"started":"20', f'"started":"3{i}'))
    (tmp_path / "link").symlink_to(tmp_path / "new")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    (tmp_path / "other").mkdir()
    assert [p.name for p in find_runs(tmp_path)] == ["new", "mid", "old", "broken"]
    assert find_runs(tmp_path / "old") == [tmp_path / "old"] and find_runs(tmp_path / "missing") == []
    with pytest.raises(RunFormatError, match=r"holds 4 runs, expected one; name it: '.*new', '.*mid'"):
        open_run(tmp_path)


def test_shows_itself_harmlessly(folder: Path) -> None:
    """Oracle: planted fault. Names with markup and escapes cannot act on a notebook or a terminal."""
    folder = folder.with_name("<b>\x1b[31m")
    recorder = Recorder(RunWriter.create(folder, script="t.py"), make_layout(("<script>",)))
    recorder.step(0)
    recorder.writer.update(versions={})
    run = open_run(folder)
    run.info["status"] = "<i>\x1b"
    assert "\x1b" not in repr(run) and "1 steps" in repr(run)
    shown = run._repr_html_()
    assert "<b>\x1b" not in shown and "<i>" not in shown and "&lt;b&gt;" in shown and "t_pair" in shown


def test_imports_little(folder: Path) -> None:
    """Oracle: planted fault. Reading, summarising and writing import neither torch, pandas nor duckdb."""
    code = (
        "import sys; from pathlib import Path; from tests.store import kit; kit.use_definitions(); "
        "from monitor.store.run import open_run; from monitor.store.writer import RunWriter; "
        f"r = kit.Recorder(RunWriter.create({str(folder)!r}, script=''), kit.make_layout()); "
        "[r.step(i) for i in range(9)]; run = open_run(r.writer.path); run.summary(); run.block('t_pair.a'); "
        "r.close(); open_run(r.writer.path).summary(); r.writer.findings([], {}, ''); run.stored_findings(); "
        "bad = {'torch', 'pandas', 'duckdb', 'streamlit', 'scipy'} & set(sys.modules); assert not bad, bad"
    )
    env = {**os.environ, "PYTHONPATH": "."}
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, env=env)
