"""What is frozen: run.json, the folder, the columns of every file. A change here is a decision with a migration.

A reader must go on reading every schema there ever was: the run in ``tests/fixtures/store/schema-<n>`` stays as it is,
and a new schema gets a run of its own (``python -m tests.fixtures.store.make``).
"""

from __future__ import annotations

import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from monitor.diagnosis.finding import Finding
from monitor.errors import UsageError
from monitor.store import layout
from monitor.store.parts import PART
from monitor.store.run import open_run
from monitor.store.stored import FINDINGS_SCHEMA
from monitor.store.summary import SUMMARY_SCHEMA
from monitor.store.writer import RunWriter
from tests.store.kit import read_back, value_at

FIXTURES = Path(__file__).parents[1] / "fixtures" / "store"


def test_run_json() -> None:
    """Oracle: golden. The keys of run.json, in their order, and what an attempt and a process consist of."""
    info = layout.new_info("train.py", {})
    assert list(info) == [
        "schema",
        "status",
        "script",
        "created",
        "ended",
        "process",
        "attempts",
        "versions",
        "facts",
        "columns",
        "drops",
        "overhead",
        "absent",
        "warnings",
        "series",
    ]
    assert layout.SCHEMA == info["schema"] == 1
    assert layout._SHAPE.keys() == info.keys()
    assert list(layout._SHAPE["attempts"][0]) == ["start_step", "started", "ended", "status", "error"]
    assert list(layout._SHAPE["process"]) == ["host", "pid", "started"]


def test_folder(folder: Path) -> None:
    """Oracle: golden. The rooms of a folder and the names in them; what is no such name is not taken for one."""
    RunWriter.create(folder, script="t.py")
    found = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))
    rooms = ["live", "series", "summary", "tables", "tail"]
    assert found == ["rank0", *(f"rank0/{r}" for r in rooms), "run.json"]
    assert layout.part_name(1, 20, 4096) == "1-000000020-000004096.parquet"
    assert layout.tail_name(1, 20) == "1-000000020.tail"
    assert layout.table_name("spectral_density", 1, 20) == "spectral_density-1-000000020.parquet"
    assert layout.FINDINGS == "findings.parquet" and layout.RUN_JSON == "run.json"
    assert layout.parse_part("1-000000020-000004096.parquet") == (1, 20, 4096)
    assert layout.parse_part("1-12345678901-12345678902.parquet") == (1, 12345678901, 12345678902)
    assert layout.parse_tail("1-000000020.tail") == (1, 20)
    assert layout.parse_table("spectral_density-1-000000020.parquet") == ("spectral_density", 1, 20)
    for name in (
        "1-2.parquet",
        "1-3-2.parquet",
        "a-1-2.parquet",
        "1-1-2.parquet.tmp",
        "1-1-2.parquet\n",
        "١-1-2.parquet",
    ):
        assert layout.parse_part(name) is None
    for name in ("1-2.tail.tmp", "-1-2.tail", "1.tail"):
        assert layout.parse_tail(name) is None
    with pytest.raises(UsageError):
        layout.table_name("x", 0, -1)


def test_columns() -> None:
    """Oracle: golden. Names and types of the columns of parts, summaries and stored findings."""
    assert [f"{f.name} {f.type}" for f in PART] == ["series int32", "step int64", "value float"]
    assert [f"{f.name} {f.type}" for f in SUMMARY_SCHEMA] == [
        "series int32",
        *(f"{name} int64" for name in ("n", "nonfinite", "first_step", "last_step")),
        *(f"{name} float" for name in ("first", "last", "min", "max")),
        *(f"{name} double" for name in ("mean", "m2", "p01", "p05", "p25", "p50", "p75", "p95", "p99")),
        "band_steps list<element: int64 not null>",
        "band_min list<element: float not null>",
        "band_max list<element: float not null>",
    ]
    assert [f"{f.name} {f.type}" for f in FINDINGS_SCHEMA] == [
        *(f"{name} string" for name in ("rule", "title", "severity", "site", "module")),
        *(f"{name} int64" for name in ("attempt", "first_step", "last_step", "peak_step")),
        "open bool",
        "count int64",
        "value double",
        "threshold double",
        "evidence string",
        "order int64",
    ]
    assert FINDINGS_SCHEMA.names == [f.name for f in fields(Finding)]
    assert not any(f.nullable for schema in (PART, SUMMARY_SCHEMA, FINDINGS_SCHEMA) for f in schema)


def check_schema_1(path: Path) -> None:
    """What `tests.fixtures.store.make` recorded under schema 1."""
    run = open_run(path)
    assert (run.status, run.attempts, run.first_step, run.last_step, run.steps) == ("finished", 2, 0, 138, 110 + 49)
    assert run.warnings == ["a warning", "dropped rows: 3"]
    assert run.metrics() == {"t_whole": ["value"], "t_pair": ["a", "b"]} and run.modules("t_pair.b") == ("x", "y")
    expected = {s: value_at(s, 0) for s in range(139)} | {100: -1.0}
    steps, values = run.series("t_whole.value")
    assert dict(zip(steps.tolist(), values.tolist(), strict=True)) == expected
    first = read_back(run, attempt=0)
    assert first["t_pair.b", "y"] == {s: value_at(s, 4) for s in range(110)}
    second = read_back(run, attempt=1)
    assert second["t_pair.b", "y"] == {s: value_at(s, 4) for s in range(90, 139)} | {100: float("inf")}
    assert 100 not in second["t_pair.a", "y"] and np.isnan(second["t_pair.a", "x"][100])
    (whole,) = run.summary("t_whole.value")
    assert (whole.n, whole.first_step, whole.last_step, whole.min, whole.max) == (159, 0, 138, -1.0, 138.0)
    (x, _) = run.summary("t_pair.a")
    assert (x.n, x.nonfinite) == (159, 1)


def test_schema_1_is_read() -> None:
    """Oracle: golden. A run written when schema 1 was new: every room, two attempts, NaN and absence."""
    path = FIXTURES / "schema-1"
    check_schema_1(path)
    run = open_run(path)
    stored = run.stored_findings()
    assert stored is not None and stored.rules_hash == "0123456789abcdef" and stored.state["last_step"] == 138
    (f,) = stored.findings
    assert (f.rule, f.module, f.first_step, f.peak_step, f.evidence) == ("t_rule", "x", 95, 97, {"ratio": 1.5})
    assert run.tables() == [("spectral_density", 1, 100)]
    assert run.table("spectral_density", 100, attempt=1).column("eigenvalue").to_pylist() == [1.0, 2.0]
    assert run.facts["parameters"][0] == {"name": "x", "trainable": True}
    assert run.info["absent"] == [{"what": "attention", "why": "no attention was seen"}]


def test_schema_1_is_resumed(folder: Path) -> None:
    """Oracle: invariance. Resuming an old run tidies it up and keeps what it says."""
    shutil.copytree(FIXTURES / "schema-1", folder)
    writer = RunWriter.create(folder, script="t.py", resume=True)
    assert (writer.attempt, writer.start_step) == (2, 139)
    writer.close("finished")
    assert not list(folder.glob("rank0/live/*")) and not list(folder.glob("rank0/tail/*"))
    run = open_run(folder)
    assert run.attempts == 3 and run.steps == 159 and run.series("t_whole.value")[1][100] == -1.0
