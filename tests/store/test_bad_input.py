"""A folder from anywhere: one clear line where it cannot be read, a warning and the rest where it can."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from monitor.block import Layout
from monitor.errors import RunFormatError
from monitor.store.parts import Points, write_part
from monitor.store.run import Run, open_run
from monitor.store.writer import RunWriter
from tests.store.kit import Recorded, Recorder, make_layout, read_back, same


@pytest.fixture
def recorded(finished: Recorder, folder: Path) -> Recorded:
    """A copy of a finished run of four large parts, to be damaged; what it held."""
    shutil.copytree(finished.writer.path, folder)
    return finished.recorded


def one_line(path: Path) -> str:
    """The message with which ``path`` is refused."""
    with pytest.raises(RunFormatError) as e:
        open_run(path)
    assert "\n" not in str(e.value) and "\x1b" not in str(e.value)
    return str(e.value)


def test_not_a_run(tmp_path: Path) -> None:
    """Oracle: planted fault. Nothing there, a file, an empty folder."""
    assert "no such folder" in one_line(tmp_path / "missing\x1b[31m")
    (tmp_path / "file").write_text("x")
    assert "is a file" in one_line(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "no run.json in it" in one_line(tmp_path / "empty")


def test_missing_run_json(recorded: Recorded, folder: Path) -> None:
    """Oracle: planted fault. Parts without the dictionary that explains them are no run."""
    (folder / "run.json").unlink()
    assert "no run.json in it" in one_line(folder)


GOOD = {"start_step": 0, "started": "", "ended": None, "status": "", "error": None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema 2, this version reads up to 1: upgrade"),
        ({"schema": 10**30}, "upgrade"),
        ({"schema": "1"}, "schema is '1', expected 1 to 1"),
        ({"schema": True}, "schema is True"),
        ({"schema": 0}, "schema is 0"),
        ({"status": None}, "it.status is NoneType, expected str"),
        ({"series": {"0": ["a", "b", "c"]}}, "it.series is dict, expected list"),
        ({"series": [["loss", "value"]]}, "it.series[0] has 2 elements, expected 3"),
        ({"series": [["loss", "value", 3]]}, "it.series[0][2] is int, expected str"),
        ({"attempts": [{**GOOD, "start_step": "0"}]}, "it.attempts[0].start_step is str, expected int"),
        ({"attempts": [{**GOOD, "start_step": 10**19}]}, "does not fit into 64 bits"),
        ({"attempts": [{**GOOD, "start_step": True}]}, "is bool, expected int"),
        ({"attempts": [{}]}, "it.attempts[0] lacks 'start_step'"),
        ({"process": {"host": "", "pid": "1; rm", "started": 0}}, "it.process.pid is str"),
        ({"facts": {"parameters": [3]}}, "it.facts.parameters[0] is int, expected dict"),
        ({"facts": {"parameters": [{"name": None}]}}, "it.facts.parameters[0].name is NoneType"),
        ({"warnings": ["a", 3]}, "it.warnings[1] is int"),
    ],
)
def test_misshapen_run_json(recorded: Recorded, folder: Path, change: dict[str, Any], message: str) -> None:
    """Oracle: planted fault. Every type that is looked into is checked when it is opened; the message says where."""
    path = folder / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert message in one_line(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "3", '"\x1b[31m"', "[" * 100_000, '{"schema":1}', "\xff\xfe", "1" * 5000]
)
def test_nonsense_run_json(recorded: Recorded, folder: Path, text: str) -> None:
    """Oracle: planted fault. Whatever stands in run.json, one line says that it is none."""
    (folder / "run.json").write_bytes(text.encode("latin1"))
    assert "run.json" in one_line(folder)


@pytest.mark.parametrize("pid", [-1, 0, 1, 2**31, 2**62])
def test_hostile_process(recorded: Recorded, folder: Path, pid: int) -> None:
    """Oracle: planted fault. No process number makes a dead run look alive, or anything else happen."""
    path = folder / "run.json"
    info = json.loads(path.read_text())
    info["process"] |= {"pid": pid, "started": 1}
    path.write_text(json.dumps(info | {"status": "running"}))
    assert open_run(folder).status == "died"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    pq.write_table(pa.table({"series": [1], "step": [2.5], "value": ["x"]}), path)


def same_columns(path: Path) -> None:
    pq.write_table(pq.read_table(path).slice(0, 3), path)


def damaged_data(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[100] ^= 0xFF
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [truncate, empty, foreign, same_columns, damaged_data])
def test_damaged_part(recorded: Recorded, folder: Path, damage: Callable[[Path], None]) -> None:
    """Oracle: planted fault. A part that cannot be read is named, the others are read, summaries too."""
    part = sorted((folder / "rank0" / "series").iterdir())[1]
    first, last = (int(x) for x in part.stem.split("-")[1:])
    damage(part)
    (folder / "rank0" / "summary" / part.name).unlink()
    run = open_run(folder)
    rest = {k: {s: v for s, v in some.items() if not first <= s <= last} for k, some in recorded.items()}
    assert same(read_back(run), rest)
    assert len(run.warnings) == 1 and part.name in run.warnings[0] and "\n" not in run.warnings[0]
    assert {s.n for s in open_run(folder).summary()} == {len(rest["t_whole.value", ""])}


def test_hostile_part(recorded: Recorded, folder: Path) -> None:
    """Oracle: planted fault. Ids that mean nothing, steps beyond the name, unsorted rows: read what makes sense."""
    hostile = Points(
        np.array([-5, 0, 0, 0, 2**31 - 1], dtype=np.int32),
        np.array([1, 2**62, 9000, 900, 2], dtype=np.int64),
        np.ones(5, dtype=np.float32),
    )
    write_part(folder / "rank0" / "series" / "0-000000800-000001000.parquet", [hostile], 3)
    run = open_run(folder)
    assert run.series("t_whole.value")[0].tolist()[:400] == list(range(400))
    assert run.block("t_whole.value", first=900, last=900)["t_whole.value"].tolist() == [[1.0]]
    assert len(run.summary()) == 5 and len(run.frame("t_whole")) >= 401
    assert len(run.sql("select * from series").fetchall()) == 2000 + 3


def test_stray_files(recorded: Recorded, folder: Path) -> None:
    """Oracle: planted fault. Files of other names are named and ignored; unfinished ones are nobody's business."""
    series = folder / "rank0" / "series"
    for name in ("notes.txt", "0-5.parquet", "0-9-5.parquet", "0-1-2.parquet.tmp"):
        (series / name).write_text("x")
    (series / "0-000000900-000000999.parquet").mkdir()
    os.mkfifo(series / "0-000001000-000001999.parquet")
    run = open_run(folder)
    assert same(read_back(run), recorded)
    assert [w.split()[0] for w in run.warnings] == ["series/0-5.parquet", "series/0-9-5.parquet", "series/notes.txt"]


def test_links_lead_nowhere(recorded: Recorded, folder: Path, tmp_path: Path) -> None:
    """Oracle: planted fault. A linked part, room or run.json outside the folder is not read."""
    outside = tmp_path / "outside"
    shutil.copytree(folder, outside)
    series = folder / "rank0" / "series"
    parts = sorted(series.iterdir())
    parts[0].unlink()
    parts[0].symlink_to(outside / "rank0" / "series" / parts[0].name)
    run = open_run(folder)
    assert run.first_step == 108 and len(run.block("t_whole.value").steps) == 400 - 108
    shutil.rmtree(series)
    series.symlink_to(outside / "rank0" / "series")
    (folder / "rank0" / "tables").rmdir()
    (folder / "rank0" / "tables").symlink_to(outside)
    (folder / "rank0" / "findings.parquet").symlink_to(outside / "run.json")
    run = open_run(folder)
    assert run.steps == 0 and run.summary() == [] and run.tables() == [] and run.stored_findings() is None
    with pytest.raises(RunFormatError, match="leads out of the run folder"):
        RunWriter.create(folder, script="t.py", resume=True)
    (folder / "run.json").unlink()
    (folder / "run.json").symlink_to(outside / "run.json")
    assert "no run.json in it" in one_line(folder)
    whole = tmp_path / "link"
    whole.symlink_to(outside)  # the folder itself may be a link: the user named it
    assert same(read_back(open_run(whole)), recorded)


NAMES = (
    "../../../etc/passwd",
    "/absolute",
    "<script>alert(1)</script>",
    "\x1b[31mred\x1b[0m",
    "a\nb\r\u202e\u200b",
    "'; drop table series; --",
    "nul\x00",
    "\ud800",
    "[bold]markup[/bold]",
    "x" * 5000,
    "*.parquet",
    "",
)


def test_hostile_names_are_data(folder: Path) -> None:
    """Oracle: plain dict. Names of modules survive every store unchanged, and none becomes the name of a file."""
    recorder = Recorder(RunWriter.create(folder, script="\x1b[31m"), make_layout(NAMES))
    for step in range(10):
        recorder.step(step)
    for _ in range(2):
        run = open_run(folder)
        assert same(read_back(run), recorder.recorded) and run.modules("t_pair.a") == NAMES
        assert {s.module for s in run.summary("t_pair.a")} == set(NAMES)
        assert len(run.frame("t_pair")) == 10 * len(NAMES)
        assert run.sql("select count(*) from series where metric = 't_pair'").fetchall() == [(20 * len(NAMES),)]
        recorder.close()
    allowed = {"run.json", *(f"0-{a:09d}-{b:09d}.parquet" for a, b in [(0, 9)])}
    assert {p.name for p in folder.rglob("*") if p.is_file()} == allowed
    assert sorted(p.name for p in folder.parent.iterdir()) == ["run"]


def test_all_nan(folder: Path) -> None:
    """Oracle: closed form. A series of nothing but NaN is a recorded series."""
    recorder = Recorder(RunWriter.create(folder, script="t.py"), make_layout())
    for step in range(300):
        recorder.step(step, {0: float("nan")})
    for _ in range(2):
        run = open_run(folder)
        (s,) = run.summary()
        assert (s.n, s.nonfinite) == (300, 300) and np.isnan([s.min, s.mean, s.std, s.quantiles["p50"]]).all()
        assert len(s.band.steps) == 128 and np.isnan(s.band.min).all()
        steps, values = run.series("t_whole.value")
        assert len(steps) == 300 and np.isnan(values).all()
        recorder.close()


def test_damaged_tail(small: None, folder: Path) -> None:
    """Oracle: planted fault. A bad frame is named; what stands before it, and everything else, is read."""
    recorder = Recorder(RunWriter.create(folder, script="t.py"), make_layout(), every=10)
    for step in range(28):
        recorder.step(step)
    segment = max((folder / "rank0" / "tail").iterdir())
    data = bytearray(segment.read_bytes())
    data[-40] ^= 0xFF
    segment.write_bytes(bytes(data))
    run = open_run(folder)
    assert run.last_step == 26 and len(run.block("t_whole.value").steps) == 27
    (warning,) = run.warnings
    assert segment.name in warning and "bad checksum at byte" in warning and "7 steps of it were read" in warning


def test_metric_that_cannot_be_computed(folder: Path) -> None:
    """Oracle: planted fault. Rows of another version: the metric is named, the others are read."""
    writer = RunWriter.create(folder, script="t.py")
    whole, pair = make_layout().segments
    writer.tail.layout(Layout(0, (whole, replace(pair, stats=("p", "q")))))
    writer.tail.row(0, 0, np.zeros(5, dtype=np.float32).tobytes())
    run = open_run(folder)
    assert run.metrics() == {"t_whole": ["value"]}
    assert len(run.warnings) == 1 and "metric t_pair: its formula raised KeyError" in run.warnings[0]


def test_broken_definitions_do_not_stop_reading(
    recorded: Recorded, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: planted fault. With a broken metric file in the package, what parts hold is still read."""
    (tmp_path / "t_broken.py").write_text('"""No METRIC here."""')
    monkeypatch.setattr("monitor.metrics.__path__", [str(tmp_path)])
    run = Run(folder)
    assert same(read_back(run), recorded)
    assert run.refs() and any("no metric can be computed" in w for w in run.warnings)
