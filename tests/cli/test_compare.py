from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from monitor.store.run import open_run
from monitor.store.writer import RunWriter
from monitor_cli import json_compare, render, render_compare
from tests.cli.kit import FLOOR, assert_light, spent

if TYPE_CHECKING:
    from monitor.metric import Array

    from .conftest import Record, Shell

HOSTILE = "[bold red]w[/]\x1b[31m\x07\r\n\u202e../../x"


def lines(text: str) -> list[str]:
    return text.rstrip("\n").split("\n")


def keys(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value).union(*map(keys, value.values()))
    return set().union(*map(keys, value)) if isinstance(value, list) else set()


def model(size: int, lr: float) -> dict[str, Any]:
    parameters = [{"name": "w", "numel": size, "trainable": True, "optimizer": 0, "group": 0, "tied_to": []}]
    return {"class": "Net", "parameters": parameters, "optimizers": [{"class": "AdamW", "groups": [{"lr": lr}]}]}


def rate(lr: float) -> dict[str, dict[str, Array]]:
    return {"learning_rate.lr": {"group[0]": np.full(300, lr)}}


class TestScreen:
    def test_two_runs_that_part(self, record: Record, shell: Shell) -> None:
        """Oracle: planted fault. The step, the cause first, and the verdicts."""
        good, bad = record("good", jump=False), record("bad")
        result = shell("compare", good, bad)
        assert result.exit_code == 0
        assert max(map(len, lines(result.stdout))) <= 80
        assert len(lines(result.stdout)) <= 30
        for part in (
            "good  finished    300",
            "● HEALTHY",
            "▲ WARNING  step 200",
            "Nothing that is known about the runs differs.",
            "loss, 0.4097 to 20.96 on a log scale, steps 0 to 299",
            "bad against good",
            "identical until step 199 (17 series, steps 0 to 299)",
            "first     step 200  input_rms.rms   input[0]",
            "step 200  grad_norm.norm  layers.0.weight",
            "… and 7 more series",
            "none of 17 series leaves the noise band later, for 20 points",
        ):
            assert part in result.stdout, part

    def test_a_folder_begins_with_the_first_begun(self, record: Record, shell: Shell, tmp_path: Path) -> None:
        for name, begun in (("new", "2030-01-01T00:00:00+00:00"), ("old", "2020-01-01T00:00:00+00:00")):
            path = record(name) / "run.json"
            info = json.loads(path.read_text())
            info["attempts"][0]["started"] = begun
            path.write_text(json.dumps(info))
        text = shell("compare", tmp_path / "runs").stdout
        assert "new against old" in text
        assert "identical in all 17 series, steps 0 to 299" in text
        # a run that is named stands where it is named
        assert "old against new" in shell("compare", tmp_path / "runs" / "new", tmp_path / "runs").stdout

    def test_without_a_path_it_is_the_folder_of_runs(
        self, record: Record, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        record("a")
        record("b")
        monkeypatch.chdir(tmp_path)
        assert "against" in shell("compare").stdout

    def test_what_differs(self, record: Record, shell: Shell) -> None:
        a = record("a", facts=model(1000, 1e-3))
        b = record("b", facts=model(2000, 1e-3) | {"argv": ["train.py", "--wide"]})
        text = shell("compare", a, b).stdout
        assert "differs     a      b" in text
        assert "parameters  1,000  2,000" in text
        assert "arguments   –      --wide" in text

    def test_a_sweep(self, record: Record, shell: Shell) -> None:
        heads = {"attn_logit_max.lse_max": {"blocks.0[0]": np.full(300, 10.0)}}
        paths = [
            record(f"{size}-{lr}", facts=model(size, lr), more=heads | rate(lr))
            for size in (1000, 10_000, 100_000)
            for lr in (1e-3, 3e-3, 1e-2)
        ]
        text = shell("compare", *paths).stdout
        assert text.count("learning-rate sensitivity at ") == 3
        assert "peak lr  0.001   0.003   0.01" in text
        assert text.count("attention logits against size at peak lr ") == 3
        assert "1,000,000" in text
        assert "10 predicted" in text
        assert "0.001 ×3, 0.003 ×3, 0.01 ×3" in text
        assert "1 more not laid over the first" in text
        assert "not laid" not in shell("compare", "--all", *paths).stdout

    def test_a_column_is_shown(self, record: Record, shell: Shell) -> None:
        """Oracle: planted. The last value, of two modules the larger; NaN only where there is nothing else."""
        ref = "jacobian_spectrum.condition"
        more = {ref: {"a": np.full(300, 5.0), "b": np.arange(300.0)}, "sharpness.value": {"": np.full(300, np.nan)}}
        a, b = record("a", more=more), record("b", jump=False)
        text = shell("compare", a, b, "--show", ref, "--show", "sharpness.value").stdout
        head, row, other = lines(text)[:3]
        # status and steps are the same in both, and leave their room to what was asked for
        assert head.split() == ["run", "loss", "condition", "sharpness", "verdict"]
        assert row.split()[2:4] == ["299", "nan"]
        assert other.split()[2] == "●"
        found = json.loads(shell("compare", a, b, "--show", ref, "--json").stdout)["runs"]
        assert [r["shown"] for r in found] == [{ref: 299}, {}]
        result = shell("compare", a, b, "--show", "loss.nothing")
        assert result.exit_code == 2
        assert "no run has loss.nothing" in result.stderr

    def test_of_many_runs_each_parting_is_a_line(self, record: Record, shell: Shell) -> None:
        """Oracle: planted fault. Of four others one parts at step 200, one is the same, two differ from the start."""
        first, same, parts = record("0", jump=False), record("1", jump=False), record("2")
        loss = open_run(first).series("loss.value")[1]
        others = [record(str(i), jump=False, more={"loss.value": {"": loss + i / 1000}}) for i in (3, 4)]
        paths = [first, same, parts, *others]
        told = shell("compare", *paths).stdout.partition("against 0")[2]
        assert "1  identical" in told
        assert "2  same until 199" in told
        assert "2 different from the start and not outside its noise band later" in told
        assert "3 against 0" in shell("compare", "--all", *paths).stdout

    def test_a_larger_model_that_would_diverge(self, record: Record, shell: Shell) -> None:
        paths = [
            record(
                str(size),
                facts=model(size, 1e-3),
                more={"attn_logit_max.lse_max": {"blocks.0[0]": np.full(300, size / 10)}},
            )
            for size in (1000, 10_000, 100_000)
        ]
        text = shell("compare", *paths).stdout
        assert "100,000 predicted" in text
        assert "above 10,000 every run diverged" in text

    def test_a_hundred_runs(self, record: Record, shell: Shell, tmp_path: Path) -> None:
        first = record("0")
        for i in range(1, 100):
            shutil.copytree(first, tmp_path / "runs" / str(i))
        result = shell("compare", tmp_path / "runs")
        assert result.exit_code == 0
        assert "… and 88 more, --all lists them" in result.stdout
        assert "92 more not laid over the first" in result.stdout
        assert len(lines(result.stdout)) < 70

    def test_runs_with_little_in_them(self, record: Record, shell: Shell, tmp_path: Path) -> None:
        whole = record("whole")
        empty = RunWriter.create(tmp_path / "empty", script="train.py")
        empty.close("finished")
        nan = record("nan", more={"loss.value": {"": np.full(300, np.nan)}})
        for paths in ((whole, empty.path), (empty.path, whole), (whole, nan), (nan, whole), (nan, empty.path)):
            for flag in ("--all", "--json"):
                result = shell("compare", *paths, flag)
                assert result.exit_code == 0, result.stderr
        assert "no series at common steps" in shell("compare", whole, empty.path).stdout
        assert "×" * 60 in shell("compare", whole, nan).stdout

    def test_a_truncated_run(self, record: Record, shell: Shell) -> None:
        whole, cut = record("whole"), record("cut")
        for part in (p for p in (cut / "rank0").rglob("*.parquet") if p.name != "findings.parquet"):
            part.write_bytes(part.read_bytes()[:1000])
        result = shell("compare", whole, cut)
        assert result.exit_code == 0, result.stderr
        assert "no series at common steps" in result.stdout

    def test_names_are_shown_and_not_obeyed(self, record: Record, shell: Shell) -> None:
        wild = np.where(np.arange(300) == 200, 100.0, 1.0)
        more = {ref: {HOSTILE: wild} for ref in ("input_rms.rms", "logged.value")}
        a = record("\x1b[2J[red]run", more=more, facts=model(3, 1e-3) | {"class": HOSTILE, HOSTILE: HOSTILE})
        b = record("other", more={r: {HOSTILE: 2 * wild} for r in more}, facts={"class": "Net", HOSTILE: "x\x1b"})
        for args in ((a, b), (a, b, "--all"), (a, b, "--json"), (b, a), (a.parent,)):
            result = shell("compare", *args)
            assert result.exit_code == 0, result.stderr
            assert all(c == "\n" or c.isprintable() for c in result.stdout)
        assert r"\x1b[2J[red]run" in shell("compare", a, b).stdout

    def test_curves_share_their_axes(self) -> None:
        """Oracle: closed form. A half-length run takes half the cells, and one value has one height."""
        frame = render.Frame(0, 99, 0.0, 8.0)
        steps = np.arange(0, 50, 10)
        drawn = render.spark(steps, np.array([0, 2, 4, 6, 8], np.float32), 49, 10, False, frame)
        assert drawn == "▁▃▅▇█     "

    def test_what_is_the_same_in_all_is_left_out(self, record: Record, shell: Shell) -> None:
        """Oracle: definition. A column of equal numbers says nothing in a comparison; ``--all`` has it."""
        paths = [record(name, facts=model(1000, 1e-3)) for name in ("a", "b")]
        wide = record("wide", facts=model(2000, 1e-3))
        assert "parameters" not in lines(shell("compare", *paths).stdout)[0]
        assert "parameters" in lines(shell("compare", *paths, "--all").stdout)[0]
        assert "parameters" in lines(shell("compare", *paths, wide).stdout)[0]


class TestWhichRuns:
    def test_fewer_than_two(self, record: Record, shell: Shell) -> None:
        path = record("only")
        for args in ((path,), (path, path), (path, path.parent), (path.parent,)):
            result = shell("compare", *args)
            assert result.exit_code == 2
            assert result.stdout == ""
            assert len(lines(result.stderr)) == 1
            assert "a comparison needs two or more" in result.stderr

    def test_unreadable(self, record: Record, shell: Shell, tmp_path: Path) -> None:
        good = record("good")
        record("second")
        bad = tmp_path / "runs" / "bad\x1b[31m"
        bad.mkdir()
        (bad / "run.json").write_text("{")
        foreign = tmp_path / "foreign"
        foreign.mkdir()
        for path in (bad, foreign, tmp_path / "missing", bad / "run.json"):
            result = shell("compare", good, path)
            assert result.exit_code == 3
            assert result.stdout == ""
            assert len(lines(result.stderr)) == 1
            assert "\x1b" not in result.stderr
        # one of many does not stop the others
        for flag in ("--all", "--json"):
            result = shell("compare", tmp_path / "runs", flag)
            assert result.exit_code == 0
            assert "second" in result.stdout
            assert "unreadable" in result.stdout
            assert "\x1b" not in result.stdout

    def test_usage(self, shell: Shell) -> None:
        assert shell("compare", "--unknown").exit_code == 2


class TestJson:
    def test_schema_1(self, record: Record, shell: Shell) -> None:
        """Oracle: golden. A change of this is a new schema number and a decision."""
        heads = {"attn_logit_max.lse_max": {"blocks.0[0]": np.full(300, 10.0)}}
        paths = [
            record(f"{size}-{lr}", jump=lr == 3e-3, facts=model(size, lr), more=heads | rate(lr))
            for size in (1000, 10_000, 100_000)
            for lr in (1e-3, 3e-3, 1e-2)
        ]
        found = json.loads(shell("compare", *paths, "--json").stdout)
        assert found["schema"] == 1
        assert list(found) == ["schema", "runs", "unreadable", "differs", "partings", "sensitivity", "extrapolation"]
        assert set(found["runs"][0]) == {
            "path", "name", "status", "steps", "first_step", "last_step", "loss", "nonfinite", "logged", "shown",
            "rate", "parameters", "level", "text", "onset", "head",
        }  # fmt: skip
        parting = found["partings"][0]
        assert set(parting) == {
            "run", "series", "judged", "first_step", "last_step", "identical_until", "first", "start", "later"
        }  # fmt: skip
        assert parting["run"] == "1000-0.003"
        assert parting["identical_until"] is None
        assert set(parting["first"][0]) == {"series", "module", "site", "step", "reference", "value"}
        assert (parting["first"][0]["series"], parting["first"][0]["step"]) == ("learning_rate.lr", 0)
        assert parting["start"][0].keys() == parting["first"][0].keys() | {"low", "high"}
        assert {k: type(v) for k, v in found["sensitivity"][0].items()} == {
            "parameters": int, "rates": list, "losses": list, "value": float, "best": float
        }  # fmt: skip
        assert {k: type(v) for k, v in found["extrapolation"][0].items()} == {
            "rate": float, "step": int, "parameters": list, "logits": list, "size": int, "predicted": float,
            "beyond": bool,
        }  # fmt: skip
        assert found["differs"]["parameters"] == ["1,000"] * 3 + ["10,000"] * 3 + ["100,000"] * 3

    def test_every_key_is_documented(self, record: Record, shell: Shell) -> None:
        found = json.loads(shell("compare", record("a", jump=False), record("b"), "--json").stdout)
        assert [k for k in keys(found) if k not in (json_compare.__doc__ or "")] == []

    def test_it_is_strict(self, record: Record, shell: Shell) -> None:
        def never(name: str) -> None:
            raise AssertionError(name)

        a = record("a", more={"loss.value": {"": np.full(300, np.nan)}})
        found = json.loads(shell("compare", a, record("b"), "--json").stdout, parse_constant=never)
        assert found["runs"][0]["loss"] == "nan"
        assert found["partings"][0]["first"][0]["reference"] == "nan"


class TestCost:
    def test_heavy_libraries_stay_out(self, record: Record) -> None:
        assert_light("compare", str(record("a")), str(record("b")))

    def test_it_answers_within_a_second_of_cpu(self, record: Record) -> None:
        """On a machine that is busy or slow: within four times what importing the libraries alone takes there."""
        paths = [str(record(name, parameters=80)) for name in ("a", "b")]
        ours = min(spent("-m", "monitor_cli", "compare", *paths) for _ in range(2))
        floor = spent(*FLOOR)
        assert ours < max(1.0, 4 * floor)


def test_logged_values_of_other_data_come_first(record: Record, shell: Shell) -> None:
    """Oracle: definition. Of what a script logged, that of validation data heads the table."""
    more = {"logged.value": {"epoch": np.arange(300.0), "aux": np.ones(300), "val_acc": np.full(300, 0.5)}}
    text = shell("compare", record("a", more=more), record("b", more=more)).stdout
    head = lines(text)[0].split()
    assert head.index("val_acc") < head.index("epoch")
    assert "aux" not in head
    assert render_compare.LOGGED == 2
