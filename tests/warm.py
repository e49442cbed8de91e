"""Python processes that have torch imported as they begin: each is a fork of one that has trained nothing.

A new interpreter takes seconds to import torch, a fork next to nothing. It is a process as any other all the same: with
a folder, an environment, a ``__main__``, streams, exit handlers and an exit status of its own. Tests of what happens
while things are imported, or of the interpreter's own flags, start a new one.
"""

from __future__ import annotations

import atexit
import gc
import io
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
#: What a recorded training has imported by the time of its first step; an optimizer imports the last one.
IMPORTED = ("monitor.record.launcher", "monitor.store.run", "monitor_cli.app", "torch._dynamo")

_numbers = count()


class Warm:
    """``python args…`` in a fork; the rest is as in `subprocess.Popen`, output is kept in files.

    Args:
        args: a script and its arguments, or ``-m``, a module and its arguments.
        cwd: the folder it begins in.
        env: the whole environment; default: this process's.
    """

    def __init__(self, args: Sequence[str | Path], cwd: Path, env: Mapping[str, str] | None = None) -> None:
        self._parent, folder = _parent()
        self._streams = [folder / f"{next(_numbers)}.{name}" for name in ("out", "err")]
        order = {
            "args": [str(a) for a in args],
            "cwd": str(cwd),
            "env": dict(os.environ if env is None else env),
            "streams": [str(path) for path in self._streams],
        }
        self.returncode: int | None = None
        self.pid: int = _ask(self._parent, order)

    def poll(self) -> int | None:
        """The exit status, minus the signal that ended it; None while it runs."""
        if self.returncode is None:
            self.returncode = _ask(self._parent, self.pid)
        return self.returncode

    def communicate(self, timeout: float = 240) -> tuple[str, str]:
        """What it wrote to standard output and standard error, when it has ended."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                os.kill(self.pid, 9)
                raise TimeoutError(f"process {self.pid} still runs after {timeout} s")
            time.sleep(0.005)
        out, err = (path.read_text() for path in self._streams)
        return out, err


def run_warm(
    *args: str | Path, cwd: Path, env: Mapping[str, str] | None = None, check: bool = False
) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` of ``python args…`` in a fork, its output captured."""
    process = Warm(args, cwd, env)
    out, err = process.communicate()
    assert process.returncode is not None
    assert not check or process.returncode == 0, err
    return subprocess.CompletedProcess([str(a) for a in args], process.returncode, out, err)


@cache
def _parent() -> tuple[subprocess.Popen[str], Path]:
    """The process that forks, and a folder for what the forks write."""
    folder = tempfile.TemporaryDirectory()
    path = os.pathsep.join(str(p) for p in (ROOT, ROOT / "cli", os.environ.get("PYTHONPATH", "")))
    parent = subprocess.Popen(
        [sys.executable, "-c", "from tests.warm import serve; serve()"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip

    def end() -> None:
        with parent:  # closes its standard input, at which it ends
            folder.cleanup()

    atexit.register(end)
    return parent, Path(folder.name)


def _ask(parent: subprocess.Popen[str], what: Any) -> Any:
    assert parent.stdin is not None and parent.stdout is not None
    parent.stdin.write(json.dumps(what) + "\n")
    parent.stdin.flush()
    return json.loads(parent.stdout.readline())


def serve() -> None:
    """Fork for each order that comes in, and say how those that are asked after have ended; return in the forks."""
    for name in IMPORTED:
        import_module(name)
    gc.freeze()  # a collection would write to what the forks share
    orders, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    for line in orders:
        what = json.loads(line)
        if isinstance(what, dict):
            answer = os.fork()
            if answer == 0:
                orders.close()
                answers.close()
                return _become(what)
        else:
            pid, status = os.waitpid(what, os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    os._exit(0)


def _become(order: dict[str, Any]) -> None:
    """Go on as ``python args…``."""
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    for number, path in enumerate(order["streams"], 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False))
    added = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p not in sys.path]
    args = order["args"]
    if args[0] == "-m":
        sys.path[:1] = [order["cwd"], *added]
        sys.argv = args[1:]
        runpy._run_module_as_main(args[1])  # pyright: ignore[reportAttributeAccessIssue]
        return
    script = Path(args[0]).resolve()
    sys.path[:1] = [str(script.parent), *added]
    sys.argv = args
    main = types.ModuleType("__main__")
    main.__file__ = str(script)
    sys.modules["__main__"] = main
    exec(compile(script.read_bytes(), script, "exec", dont_inherit=True), main.__dict__)
