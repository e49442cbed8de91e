"""Finds the run folders below a folder."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from monitor.errors import RunFormatError
from monitor.store import layout

_DEPTH = 3  # of folders in which runs are looked for


def find_runs(path: str | os.PathLike[str]) -> list[Path]:
    """The run folders at or below ``path``, the one started or resumed last first.

    Args:
        path: a run, a folder of runs, or a folder of such folders; links are not followed.
    """
    found: list[Path] = []
    level = [Path(path)]
    for _ in range(_DEPTH + 1):
        below: list[Path] = []
        for folder in level:
            with suppress(OSError):  # a folder that may not be read holds no run for us
                if (folder / layout.RUN_JSON).is_file():
                    found.append(folder)
                    continue
                with os.scandir(folder) as entries:
                    below += [folder / e.name for e in entries if e.is_dir(follow_symlinks=False) and e.name[:1] != "."]
        level = below
    return sorted(sorted(found), key=_begun, reverse=True) if len(found) > 1 else found


def _begun(folder: Path) -> tuple[str, float]:
    try:
        started = layout.read_info(folder)["attempts"][-1]["started"]
        return started, (folder / layout.RUN_JSON).stat().st_mtime
    except (RunFormatError, IndexError, OSError):
        return "", 0.0
