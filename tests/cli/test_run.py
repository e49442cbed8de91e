from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from tests.warm import run_warm

if TYPE_CHECKING:
    from .conftest import Shell

Call = tuple[Path, list[str], Path | None, bool, int]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """What the launcher was called with; it answers 7."""
    seen: list[Call] = []

    def run_main(main: Path, argv: list[str], run_dir: Path | None, curvature: bool, every: int) -> int:
        seen.append((main, argv, run_dir, curvature, every))
        return 7

    launcher = SimpleNamespace(find_script=lambda path: path, find_module=None, run_main=run_main)
    monkeypatch.setitem(sys.modules, "monitor.record.launcher", launcher)
    return seen


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text("import sys\nprint(sys.argv[1:])\nsys.exit(5)\n")
    return path


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["--help"],
        ["--run-dir", "x", "--debug", "--version", "-m"],
        ["a", "--", "b", "--lr=1e-3", "-h"],
        ["", " ", "é"],
    ],
    ids=str,
)
def test_all_after_the_script_is_the_scripts(calls: list[Call], shell: Shell, script: Path, args: list[str]) -> None:
    assert shell("run", script, *args).exit_code == 7
    assert calls == [(script, [str(script), *args], None, False, 1)]


def test_options_before_the_script_are_ours(calls: list[Call], shell: Shell, script: Path, tmp_path: Path) -> None:
    ours = ["--curvature", "--every", "10", "--run-dir", tmp_path / "here"]
    assert shell("run", *ours, script, "--run-dir", "there").exit_code == 7
    assert calls == [(script, [str(script), "--run-dir", "there"], tmp_path / "here", True, 10)]


def test_a_script_that_is_not_there_is_one_line(calls: list[Call], shell: Shell, tmp_path: Path) -> None:
    for name, said in (("no\x1b[31m.py", "does not exist"), ("", "is a folder")):
        result = shell("run", tmp_path / name)
        assert result.exit_code == 2
        assert len(result.stderr.splitlines()) == 1
        assert said in result.stderr
        assert "\x1b" not in result.stderr
    assert calls == []


def test_a_folder_with_a_main_is_run(calls: list[Call], shell: Shell, script: Path) -> None:
    folder = script.parent
    (folder / "__main__.py").touch()
    assert shell("run", folder, "--lr", "1").exit_code == 7
    assert calls == [(folder, [str(folder), "--lr", "1"], None, False, 1)]


def test_no_script_is_usage(calls: list[Call], shell: Shell) -> None:
    assert shell("run").exit_code == 2
    assert shell("run", "--unknown", "x.py").exit_code == 2
    assert shell("run", "--every", "0", "x.py").exit_code == 2


def test_the_real_launcher_keeps_arguments_and_exit_code(script: Path) -> None:
    done = run_warm("-m", "monitor_cli", "run", script, "--help", "--run-dir", "x", cwd=script.parent)
    assert done.stdout == "['--help', '--run-dir', 'x']\n"
    assert done.returncode == 5


@pytest.mark.parametrize("content", ["import sys\nx = (1,\n", "def f():\n    raise KeyError('x')\n\nf()\n"])
def test_a_script_that_fails_shows_what_python_shows(tmp_path: Path, content: str) -> None:
    """Oracle: independent library. Python itself, of a script that cannot be compiled and of one that raises."""
    script = tmp_path / "broken.py"
    script.write_text(content)
    pythons = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    ours = run_warm("-m", "monitor_cli", "run", script, cwd=tmp_path)
    assert ours.stderr.startswith(pythons.stderr)
    assert ours.returncode == pythons.returncode == 1
