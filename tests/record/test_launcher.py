"""``monitor run`` against Python itself, on what a script can see of how it was started."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import monitor
from monitor.errors import UsageError
from monitor.record.launcher import find_module, find_script
from tests.warm import run_warm

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


@pytest.mark.parametrize("name", [pytest.param("here", marks=pytest.mark.slow), "here.zip"])
def test_a_folder_or_a_zip_file_finds_itself_as_under_python(name: str, tmp_path: Path) -> None:
    """Oracle: independent library. Python itself; what it imports lies beside it."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "__main__.py").write_text(SEES + "import near")
    (tmp_path / "here" / "near.py").write_text("print(__name__, __file__)")
    shutil.make_archive(str(tmp_path / "here"), "zip", tmp_path / "here")
    pythons = subprocess.run([sys.executable, name, "-x"], cwd=tmp_path, capture_output=True, text=True)
    ours = run_warm("-m", "monitor_cli", "run", name, "-x", cwd=tmp_path)
    assert pythons.returncode == 0, pythons.stderr
    assert ours.stdout == pythons.stdout


def test_where_a_folder_and_a_zip_file_begin(tmp_path: Path) -> None:
    """Oracle: definition. The folder, or the file, is where modules are looked for; without a main it is refused."""
    folder, empty = tmp_path / "here", tmp_path / "empty"
    for made in (folder, empty):
        made.mkdir()
    (folder / "__main__.py").write_text("found = 1")
    for made in (folder, empty):
        shutil.make_archive(str(made), "zip", made)
    for path in (folder, tmp_path / "here.zip"):
        main = find_script(path)
        assert (main.folder, main.path) == (str(path), str(path / "__main__.py"))
        assert main.names["__package__"] == "" and main.names["__spec__"].name == "__main__"
        code = main.code()
        assert code is not None and code.co_names == ("found",)
    for path in (empty, tmp_path / "empty.zip"):
        with pytest.raises(UsageError, match=r"there is no __main__\.py in"):
            find_script(path)


@pytest.mark.parametrize("name", [pytest.param("pkg.train", marks=pytest.mark.slow), "pkg"])
def test_a_module_finds_itself_as_under_python(name: str, tmp_path: Path) -> None:
    """Oracle: independent library. ``python -m``, given a module and a package."""
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text("print('imported')")
    for file in ("train.py", "__main__.py"):
        (tmp_path / "pkg" / file).write_text(SEES + "from . import __name__ as near\nprint(near)\n")
    pythons = subprocess.run([sys.executable, "-m", name, "-m", "x"], cwd=tmp_path, capture_output=True, text=True)
    ours = run_warm("-m", "monitor_cli", "run", "-m", name, "-m", "x", cwd=tmp_path)
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


@pytest.mark.parametrize(
    "init",
    [
        "def f():\n    raise KeyError('x')\n\nf()",
        "x = (1,",
        "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise ValueError('y') from e",
        "import sys\nsys.exit(7)",
    ],
    ids=("raises", "syntax", "chain", "exit"),
)
@pytest.mark.parametrize("name", ["pkg", "pkg.train"])
def test_a_package_that_fails_shows_what_python_shows(
    name: str, init: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: independent library. ``python -m``, but for the frames of the module that runs modules.

    Where there are no others, there is no line that announces them, as of a script that cannot be compiled.
    """
    (tmp_path / "pkg").mkdir()
    for file, text in (("__init__.py", init), ("__main__.py", ""), ("train.py", "")):
        (tmp_path / "pkg" / file).write_text(text + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setattr(sys, "modules", sys.modules.copy())
    pythons = subprocess.run([sys.executable, "-m", name], capture_output=True, text=True)
    with pytest.raises(SystemExit) as ended:
        find_module(name)
    assert ended.value.code == pythons.returncode
    shown = re.sub(r"  File \"<frozen runpy>\", .*\n", "", pythons.stderr)
    assert capsys.readouterr().err == re.sub(r"^Traceback .*\n(?=  File .*, line \d+\n)", "", shown)


def test_no_such_module_is_one_line(tmp_path: Path) -> None:
    """Oracle: definition. The exit status is that of a usage error."""
    done = run_warm("-m", "monitor_cli", "run", "-m", "missing", cwd=tmp_path)
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
    run_warm("-m", "monitor_cli", "run", "-m", name, cwd=tmp_path, check=True)
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith(recorded)
    assert monitor.open(run).steps == 6
