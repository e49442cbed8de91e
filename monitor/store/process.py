"""Is the process that writes a run still there?"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: A run written on another machine counts as dead after so many seconds without a write.
SILENCE = 600.0


def this_process() -> dict[str, Any]:
    """``host``, ``pid`` and ``started`` (clock ticks from boot to its start, or None where the system does not say)."""
    return {"host": platform.node(), "pid": os.getpid(), "started": _started(os.getpid())}


def is_alive(process: Mapping[str, Any], written: float) -> bool:
    """True if the process that `this_process` described seems to be running.

    On this machine the process table decides, and the start time tells a recycled number from the process that was
    meant; on any other the time of the last write does, because nothing else of it can be seen from here.

    Args:
        process: what `this_process` gave.
        written: time of the last write to the run folder, seconds of the epoch.
    """
    if process["host"] != platform.node():
        return time.time() - written < SILENCE
    pid = process["pid"]
    if not 0 < pid < 2**31:
        return False
    if Path("/proc/self/stat").exists():
        started = _started(pid)
        return started is not None and started == process["started"]
    try:
        os.kill(pid, 0)  # signal 0 asks only whether the process exists
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return time.time() - written < SILENCE


def _started(pid: int) -> int | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        fields = stat.rpartition(")")[2].split()  # after the name, which may hold anything
        return None if fields[0] in "ZX" else int(fields[19])  # a zombie has ended
    except (OSError, ValueError, IndexError):
        return None
