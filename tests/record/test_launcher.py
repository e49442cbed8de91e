"""``monitor run`` against Python itself, on what a script can see of how it was started."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SEES = """
import atexit, os, pickle, sys

class Mine:
    pass

atexit.register(lambda: print(pickle.loads(pickle.dumps(Mine())).__class__))
os.chdir("..")
print(__file__, __name__, __spec__, __package__, sorted(vars()), sys.argv, sys.path[0])
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
