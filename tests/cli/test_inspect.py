from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from monitor.diagnosis.finding import Finding, Incident, Verdict
from monitor.rule import load_rules
from monitor.store.run import open_run
from monitor.store.writer import RunWriter
from monitor_cli import common, inspect_, render
from monitor_cli.view import KEY, look
from tests.cli.kit import FLOOR, assert_light, spent

if TYPE_CHECKING:
    from .conftest import Record, Shell

MONITOR = [sys.executable, "-m", "monitor_cli"]
HOSTILE = "[bold red]w[/]\x1b[31m\x07\r\n\u202e../../x"


def lines(text: str) -> list[str]:
    return text.rstrip("\n").split("\n")


class TestScreen:
    def test_one_screen_tells_the_whole_incident(self, record: Record, shell: Shell) -> None:
        path = record("broken", parameters=80, absent=[{"what": "attention", "why": "the region is compiled"}])
        result = shell("inspect", path)
        assert result.exit_code == 0
        assert len(lines(result.stdout)) <= 40
        assert max(map(len, lines(result.stdout))) <= 80
        for part in (
            "broken  Net  80,000 parameters",
            "finished",
            "300 steps",
            "▲ WARNING",
            "Input jump  warning  step 200  input[0]",
            "threshold 8 times the median",
            "Gradient spike  layers.0.weight … and 79 more",
            "79 more findings: --all lists them",
            "unless    the data were changed on purpose",
            "recording took 1.8% of the training time",
            "absent    attention: the region is compiled",
        ):
            assert part in result.stdout, part

    def test_all_shortens_nothing(self, record: Record, shell: Shell) -> None:
        result = shell("inspect", "--all", record("broken", parameters=80))
        assert sum("Gradient spike" in line for line in lines(result.stdout)) == 80
        assert "--all" not in result.stdout
        assert "input_rms.rms" in result.stdout

    def test_a_wide_terminal_is_used(self, record: Record, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
        path = record("broken")
        narrow = shell("inspect", path).stdout
        monkeypatch.setenv("COLUMNS", "120")
        wide = shell("inspect", path).stdout
        assert len(lines(wide)) < len(lines(narrow))
        assert 100 < max(map(len, lines(wide))) <= 120

    def test_healthy(self, record: Record, shell: Shell) -> None:
        result = shell("inspect", record("healthy", jump=False), "--all")
        assert "● HEALTHY" in result.stdout
        assert "loss_zero_frac.frac was not recorded" in result.stdout

    def test_what_is_remarkable_has_a_line_each(self, record: Record, shell: Shell) -> None:
        """Oracle: planted. Learned at step 10, generalised at 200; names in a line are made harmless."""
        learned = {
            "train_acc": np.where(np.arange(300) >= 10, 1.0, 0.1),
            "val_acc": np.where(np.arange(300) >= 200, 1.0, 0.1),
        }
        logits = {HOSTILE: np.full(300, 70.0), "a[1]": np.full(300, 3.0)}
        path = record("grok", jump=False, more={"logged.value": learned, "attn_logit_max.lse_max": logits})
        result = shell("inspect", path)
        assert len(lines(result.stdout)) <= 40
        assert max(map(len, lines(result.stdout))) <= 80
        (way,) = (line for line in lines(result.stdout) if line.startswith("phases"))
        assert way.endswith("training data learned at step 10, held-out data at step 200: delay")
        assert "attention  logits up to 70 ([bold red]w[/]" in result.stdout and "\x1b" not in result.stdout
        told = json.loads(shell("inspect", "--json", path).stdout)["remarks"]
        assert told["phases"].endswith("at step 200: delay ratio 20 (grokking)")
        assert told["attention"].startswith("logits up to 70")
        assert "phases" not in shell("inspect", record("plain", jump=False)).stdout

    def test_a_failed_run_says_why(self, record: Record, shell: Shell) -> None:
        path = record("failed", jump=False, close="failed", error="RuntimeError: out of\nmemory")
        assert r"RuntimeError: out of\nmemory" in shell("inspect", path).stdout

    def test_no_step_at_all(self, tmp_path: Path, shell: Shell) -> None:
        writer = RunWriter.create(tmp_path / "empty", script="train.py")
        writer.close("finished")
        result = shell("inspect", writer.path)
        assert result.exit_code == 0
        assert "NOT ENOUGH EVIDENCE" in result.stdout

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0, -1.0])
    def test_constant_and_not_finite_series(self, record: Record, shell: Shell, value: float) -> None:
        path = record("odd", jump=False, more={"loss.value": {"": np.full(300, value)}})
        for flag in ("--all", "--json"):
            result = shell("inspect", path, flag)
            assert result.exit_code == 0, result.stderr
        drawn = shell("inspect", path).stdout
        assert ("×" * 80 in drawn) == (not np.isfinite(value))

    def test_a_finding_of_a_rule_that_is_gone(self, record: Record) -> None:
        view = look(open_run(record("old")))
        f = Finding("gone", "Gone", "warning", "loss", "", 0, 5, 9, 7, True, 3, float("nan"), 1.0, {"x": 2.0})
        incident = Incident(f, (replace(f, module="a", first_step=3), replace(f, module="b")), "critical")
        old = replace(view, verdict=Verdict("critical", "Gone.", (incident,) * 5, {}))
        out = common.console()
        with out.capture() as text:
            out.print(render.screen(old))
        assert "since step 5" in text.get()
        assert "before" in text.get()
        assert "2 × Gone" in text.get()
        assert "… and 2 more incidents, --all lists them" in text.get()

    def test_many_series_of_one_metric_are_counted(self, record: Record, shell: Shell) -> None:
        path = record("logs", more={"logged.value": {f"val_{i}": np.arange(300.0) for i in range(7)}})
        assert shell("inspect", path).stdout.count("logged.value val_") == 4
        assert "… and 3 more (--all)" in shell("inspect", path).stdout
        assert shell("inspect", path, "--all").stdout.count("logged.value val_") == 7

    def test_key_metrics_exist(self) -> None:
        from monitor.metric import load_metrics

        columns = {f"{m.id}.{c.name}" for m in load_metrics().values() for c in m.columns}
        assert {ref for ref, _ in KEY} <= columns

    def test_of_many_modules_the_remarkable_one_is_shown(self, record: Record, shell: Shell) -> None:
        """Oracle: planted fault. The head with the largest logit and the router with the worst balance, a line each."""
        more = {
            "attn_logit_max.lse_max": {f"blocks.0[{i}]": np.full(300, 5.0 + i) for i in range(3)},
            "attn_entropy.normalised": {f"blocks.0[{i}]": np.full(300, 0.5 + i / 10) for i in range(3)},
            "router_balance.cv": {"a": np.full(300, 0.1), "b": np.full(300, 0.3), "c": np.full(300, np.nan)},
        }
        text = shell("inspect", record("moe", jump=False, more=more)).stdout
        for shown in (
            "attn_logit_max.lse_max blocks.0[2]",
            "attn_entropy.normalised blocks.0[0]",
            "router_balance.cv b",
        ):
            assert [n for n in lines(text) if n.startswith(shown.split()[0])] == [n for n in lines(text) if shown in n]
            assert shown in text

    def test_names_are_shown_and_not_obeyed(self, record: Record, shell: Shell) -> None:
        series = {
            ref: {HOSTILE: np.ones(300) * np.where(np.arange(300) == 200, 100.0, 1.0 + 0.01 * (np.arange(300) % 7))}
            for ref in ("input_rms.rms", "logged.value")
        }
        path = record(
            "\x1b[2J[red]run",
            more=series,
            warnings=[HOSTILE],
            absent=[{"what": HOSTILE, "why": HOSTILE}],
            facts={"class": HOSTILE, "parameters": [{"name": HOSTILE, "numel": 3}]},
        )
        for args in ((path,), (path, "--all"), (path, "--json"), (path.parent,)):
            result = shell("inspect", *args)
            assert result.exit_code == 0, result.stderr
            assert all(c == "\n" or c.isprintable() for c in result.stdout)
        shown = shell("inspect", path).stdout
        assert r"[bold red]w[/]\x1b[31m\x07\r\n\u202e../../x" in shown
        assert r"\x1b[2J[red]run" in shown

    def test_a_terminal_without_unicode(self, record: Record) -> None:
        env = {**os.environ, "PYTHONIOENCODING": "ascii"}
        done = subprocess.run(
            [*MONITOR, "inspect", record("broken")], env=env, capture_output=True, text=True, check=True
        )
        assert done.stdout.isascii()
        assert "^ WARNING" in done.stdout


class TestWhichRun:
    def test_no_path_takes_the_newest_of_runs(
        self, record: Record, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        record("only", jump=False)
        for folder in (tmp_path, tmp_path / "runs"):
            monkeypatch.chdir(folder)
            result = shell("inspect")
            assert result.exit_code == 0
            assert lines(result.stdout)[0].startswith("only  Net")

    def test_a_folder_gives_a_table_then_the_newest(self, record: Record, shell: Shell, tmp_path: Path) -> None:
        bad = tmp_path / "runs" / "bad"
        bad.mkdir(parents=True)
        (bad / "run.json").write_text("{")
        for name, created in (("new", "2030-01-01T00:00:00+00:00"), ("old", "2020-01-01T00:00:00+00:00")):
            path = record(name, jump=name == "new") / "run.json"
            info = json.loads(path.read_text())
            info["attempts"][0]["started"] = created
            path.write_text(json.dumps(info))
        table, _, screen = shell("inspect", tmp_path / "runs").stdout.partition("\n\n")
        assert [line.split()[0] for line in lines(table)] == ["run", "new", "old", "bad"]
        assert "▲ WARNING" in lines(table)[1]
        assert "● HEALTHY" in lines(table)[2]
        assert "unreadable" in table
        assert screen.startswith("new  Net")

    def test_many_runs_are_counted(self, record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(render, "MANY", 1)
        record("a")
        record("b")
        out = common.console()
        with out.capture() as text:
            out.print(render.runs([tmp_path / "runs" / "a", tmp_path / "runs" / "b"], everything=False))
        assert "… and 1 older, --all lists them" in text.get()


class TestExitCodes:
    @pytest.mark.parametrize(
        ("jump", "level", "code"),
        [(True, "info", 1), (True, "warning", 1), (True, "critical", 0), (False, "info", 0)],
    )
    def test_fail_on(self, record: Record, shell: Shell, jump: bool, level: str, code: int) -> None:
        assert shell("inspect", record("run", jump=jump), "--fail-on", level).exit_code == code

    @pytest.mark.parametrize(
        "args", [("--fail-on", "bad"), ("--unknown",), ("--json", "--watch"), ("a", "b")], ids=" ".join
    )
    def test_usage(self, shell: Shell, args: tuple[str, ...]) -> None:
        result = shell("inspect", *args)
        assert result.exit_code == 2
        assert result.stdout == ""
        assert result.stderr

    @pytest.mark.parametrize("content", [None, "", "{", "[]", '{"schema": 99}', '{"schema": 1}', "\x00\xff", "NaN"])
    def test_unreadable_is_one_line(self, shell: Shell, tmp_path: Path, content: str | None) -> None:
        folder = tmp_path / "run\x1b[31m"
        folder.mkdir()
        if content is not None:
            (folder / "run.json").write_text(content)
        for path in (folder, folder / "missing", folder / "run.json"):
            for args in ((path,), (path, "--json"), (path, "--watch")):
                result = shell("inspect", *args)
                assert result.exit_code == 3
                assert result.stdout == ""
                assert len(lines(result.stderr)) == 1
                assert "\x1b" not in result.stderr

    def test_a_bug_is_one_line_too_and_debug_shows_it(
        self, record: Record, shell: Shell, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*args: object) -> None:
            raise KeyError("x")

        monkeypatch.setattr(render, "screen", broken)
        path = record("run")
        result = shell("inspect", path)
        assert result.exit_code == 3
        assert result.stderr == "KeyError: 'x' (--debug shows where)\n"
        assert isinstance(shell("inspect", path, "--debug").exception, KeyError)


def shape(value: Any) -> Any:
    """A JSON value as the names of its types; of a list, the first element's."""
    if isinstance(value, dict):
        return {k: shape(v) for k, v in value.items()}
    if isinstance(value, list):
        return [shape(v) for v in value[:1]]
    return type(value).__name__


RECORDED = {
    "loss.value", "input_rms.rms", "input_rms.nonfinite", "grad_norm.norm", "grad_norm.max_abs", "grad_norm.nonfinite",
    "grad_norm_total.norm", "learning_rate.lr", "step_time.seconds",
}  # fmt: skip
FINDING = {
    "rule": "str",
    "title": "str",
    "severity": "str",
    "site": "str",
    "module": "str",
    "attempt": "int",
    "first_step": "int",
    "last_step": "int",
    "peak_step": "int",
    "open": "bool",
    "count": "int",
    "value": "float",
    "threshold": "float",
    "evidence": {"rms": "float", "median": "float", "z": "float"},
    "order": "int",
    "text": "str",
    "thresholds": [{"name": "str", "value": "float", "unit": "str", "source": "str"}],
    "experimental": "bool",
}
#: Rules none of whose series the run has.
METRICS = {ref.partition(".")[0] for ref in RECORDED}
SKIPPED = [r.id for r in load_rules().values() if r.check is not None and r.needs[0].partition(".")[0] not in METRICS]
DOCUMENT = {
    "schema": "int",
    "run": {
        "path": "str",
        "name": "str",
        "status": "str",
        "live": "bool",
        "model": "str",
        "parameters": "int",
        "script": "str",
        "started": "str",
        "seconds": "float",
        "attempts": "int",
        "first_step": "int",
        "last_step": "int",
        "error": "str",
        "overhead": {"fraction": "float"},
        "absent": [{"what": "str", "why": "str"}],
        "warnings": ["str"],
        "numbers": [
            {
                "series": "str",
                "module": "str",
                "unit": "str",
                "n": "int",
                "nonfinite": "int",
                "first": "float",
                "last": "float",
                "min": "float",
                "max": "float",
            }
        ],
    },
    "steps": "int",
    "verdict": {"level": "str", "text": "str"},
    "remarks": {},
    "incidents": [
        {
            "severity": "str",
            "head": FINDING,
            "consequences": [FINDING | {"evidence": {"loss": "float", "median": "float"}}],
            "remedies": [{"text": "str", "import_path": "str"}],
            "refute": "str",
        }
    ],
    "findings": [FINDING],
    "skipped": ["str"],
}


class TestJson:
    def test_schema_1(self, record: Record, shell: Shell) -> None:
        """Oracle: golden. A change of this is a new schema number and a decision."""
        path = record("broken", absent=[{"what": "a", "why": "b"}], warnings=["w"])
        found = json.loads(shell("inspect", path, "--json").stdout)
        assert found["schema"] == 1
        unjudged = found.pop("unjudged")
        assert shape(found) == DOCUMENT
        assert found["skipped"] == SKIPPED
        assert set(SKIPPED) <= set(unjudged)
        assert all(unjudged[rule].startswith("not applicable: ") for rule in SKIPPED)
        assert found["steps"] == 300
        assert found["findings"][0] == found["incidents"][0]["head"]
        assert len(found["findings"]) == 1 + len(found["incidents"][0]["consequences"]) == 6

    def test_every_key_is_documented(self, record: Record, shell: Shell) -> None:
        from monitor_cli import jsonout

        def keys(value: Any) -> set[str]:
            if isinstance(value, dict):
                return set(value).union(*map(keys, value.values()))
            return keys(value[0]) if isinstance(value, list) and value else set()

        free = {*FINDING["evidence"], "loss", "fraction"}
        assert [k for k in (keys(DOCUMENT) | {"unjudged"}) - free if k not in (jsonout.__doc__ or "")] == []

    def test_it_is_strict(self, record: Record, shell: Shell) -> None:
        def never(name: str) -> None:
            raise AssertionError(name)

        path = record(
            "odd", more={"loss.value": {"": np.full(300, np.nan)}, "clip.coefficient": {"": np.full(300, np.inf)}}
        )
        text = shell("inspect", path, "--json").stdout
        numbers = {n["series"]: n for n in json.loads(text, parse_constant=never)["run"]["numbers"]}
        assert numbers["loss.value"]["last"] == "nan"
        assert numbers["clip.coefficient"]["last"] == "inf"

    def test_of_a_folder_it_is_the_newest_run(self, record: Record, shell: Shell, tmp_path: Path) -> None:
        record("only")
        assert json.loads(shell("inspect", tmp_path / "runs", "--json").stdout)["run"]["name"] == "only"


class TestWatch:
    def test_it_ends_with_the_run(
        self, record: Record, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(inspect_, "REFRESH_S", 0.05)
        writer = RunWriter.create(tmp_path / "live", script="train.py")
        timer = threading.Timer(0.5, writer.close, ["finished"])
        timer.start()
        result = shell("inspect", writer.path, "--watch")
        timer.join()
        assert result.exit_code == 0
        assert "finished" in result.stdout

    def test_ctrl_c_is_clean(self, record: Record) -> None:
        path = record("live", close=None)
        process = subprocess.Popen(
            [*MONITOR, "inspect", str(path), "--watch"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        time.sleep(2.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=10)
        assert process.returncode == 0
        assert "running for" in out
        assert err == ""

    def test_a_low_terminal_is_redrawn_in_place(
        self, record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from rich.console import Console

        monkeypatch.setattr(inspect_, "REFRESH_S", 0.05)
        file = io.StringIO()
        monkeypatch.setattr(
            inspect_, "console", lambda: Console(file=file, force_terminal=True, width=80, height=10, markup=False)
        )
        writer = RunWriter.create(tmp_path / "live", script="train.py")
        timer = threading.Timer(0.4, writer.close, ["finished"])
        timer.start()
        view = inspect_._watched(open_run(writer.path), everything=False)
        timer.join()
        assert view.run.status == "finished"
        assert "running" in file.getvalue()
        # every drawing is wiped by going up and erasing: nothing is left for the screen that is printed at the end
        assert file.getvalue().rstrip().endswith(("\x1b[2K", "\x1b[?25h"))


class TestCost:
    @pytest.mark.parametrize("args", [("inspect",), ("inspect", "--json"), ("inspect", "--all")], ids=" ".join)
    def test_heavy_libraries_stay_out(self, record: Record, args: tuple[str, ...]) -> None:
        assert_light(*args, str(record("run")))

    def test_it_answers_within_half_a_second_of_cpu(self, record: Record) -> None:
        """On a machine that is busy or slow: within twice what importing the libraries alone takes there."""
        path = record("run", parameters=80)
        ours, floor = [], []
        for _ in range(6):  # the best of several: what other processes do to the caches is counted too
            ours.append(spent("-m", "monitor_cli", "inspect", str(path)))
            floor.append(spent(*FLOOR))
            if min(ours) < 0.5:
                break
        assert min(ours) < max(0.5, 2 * min(floor)), (ours, floor)
