"""``monitor run`` against Python itself, on what a script can see of how it was started."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import monitor
from monitor.errors import UsageError
from monitor.record.launcher import find_module

SEES = """
import atexit, os, pickle, sys

class Mine:
    pass

atexit.register(lambda: print(pickle.loads(pickle.dumps(Mine())).__class__))
os.chdir("..")
print(__file__, __name__, getattr(__spec__, "name", None), __package__, sorted(vars()), sys.argv, sys.path[0])
print(__cached__, type(__loader__), __doc__)
"""

SPAWNS = """
import torch
from torch.utils.data import DataLoader, Dataset

class Data(Dataset):
    def __len__(self):
        return 24
    def __getitem__(self, i):
        return torch.ones(4) * i

def main():
    model = torch.nn.Linear(4, 2)
    opt = torch.optim.SGD(model.parameters(), lr=1e-4)
    for x in DataLoader(Data(), 4, num_workers=1, multiprocessing_context="spawn"):
        opt.zero_grad()
        model(x).square().mean().backward()
        opt.step()

if __name__ == "__main__":
    main()
"""


def test_a_script_finds_itself_as_under_python(tmp_path: Path) -> None:
    """Oracle: independent library. Python itself, given a relative path; it changes folder and pickles at its end."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "train.py").write_text(SEES)
    ours, pythons = (
        subprocess.run([sys.executable, *args, "here/train.py", "-x"], cwd=tmp_path, capture_output=True, text=True)
        for args in (["-m", "monitor_cli", "run"], [])
    )
    assert pythons.returncode == 0
    assert ours.stdout == pythons.stdout


@pytest.mark.parametrize("name", [pytest.param("pkg.train", marks=pytest.mark.slow), "pkg"])
def test_a_module_finds_itself_as_under_python(name: str, tmp_path: Path) -> None:
    """Oracle: independent library. ``python -m``, given a module and a package."""
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text("print('imported')")
    for file in ("train.py", "__main__.py"):
        (tmp_path / "pkg" / file).write_text(SEES + "from . import __name__ as near\nprint(near)\n")
    ours, pythons = (
        subprocess.run([sys.executable, *args, "-m", name, "-m", "x"], cwd=tmp_path, capture_output=True, text=True)
        for args in (["-m", "monitor_cli", "run"], [])
    )
    assert pythons.returncode == 0, pythons.stderr
    assert ours.stdout == pythons.stdout


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing", "there is no module 'missing'"),
        ("pkg", "there is no module 'pkg' that Python could run"),
        ("pkg.missing", "there is no module 'pkg.missing'"),
        ("pkg.broken.train", "No module named 'nowhere'"),
        ("file.py", "cannot be found"),
        ("", "module ''"),
        (".x", "cannot be found"),
    ],
)
def test_no_such_module(name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: definition. Whatever is missing is named."""
    (tmp_path / "pkg" / "broken").mkdir(parents=True)
    (tmp_path / "pkg" / "__init__.py").touch()
    (tmp_path / "pkg" / "broken" / "__init__.py").write_text("import nowhere")
    (tmp_path / "file.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setattr(sys, "modules", sys.modules.copy())
    with pytest.raises(UsageError, match=re.escape(said)):
        find_module(name)


def test_no_such_module_is_one_line(tmp_path: Path) -> None:
    """Oracle: definition. The exit status is that of a usage error."""
    command = [sys.executable, "-m", "monitor_cli", "run", "-m", "missing"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "recorded"), [("grok.train", "train-"), pytest.param("grok", "grok-", marks=pytest.mark.slow)]
)
def test_a_module_is_recorded(name: str, recorded: str, tmp_path: Path) -> None:
    """Oracle: definition. Workers that are spawned find it; a package gives the run its name, not ``__main__``."""
    (tmp_path / "grok").mkdir()
    (tmp_path / "grok" / "train.py").write_text(SPAWNS)
    (tmp_path / "grok" / "__main__.py").write_text("from grok.train import main\nmain()")
    command = [sys.executable, "-m", "monitor_cli", "run", "-m", name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith(recorded)
    assert monitor.open(run).steps == 6
