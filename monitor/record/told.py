"""What is printed of the trainings that one script makes one after the other."""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import suppress

from monitor.diagnosis.finding import Verdict
from monitor.diagnosis.text import BADGES
from monitor.record.flush import to_stderr

#: Verdicts that are printed of runs in trouble, and as many of others; the rest are counted.
TOLD = 3
_TROUBLE = ("critical", "warning")


class Told:
    """Everything of the first few recordings, then a verdict only where it is news, and at the end how many there were.

    A search over hundreds of small models would otherwise print hundreds of verdicts between the lines of the script.
    """

    def __init__(self) -> None:
        self._begun = 0
        self._levels: Counter[str] = Counter()
        self._first: dict[str, str] = {}  # level -> folder of the first run of it

    def begins(self) -> bool:
        """One more recording begins; False if that is not to be printed."""
        self._begun += 1
        if self._begun == TOLD + 1:
            to_stderr("further trainings are recorded like these; only what is wrong is printed, and a sum at the end")
        return self._begun <= TOLD

    def ends(self, verdict: Verdict, folder: str) -> bool:
        """It has ended; False if its verdict is not to be printed."""
        trouble = verdict.level in _TROUBLE
        told = sum(n for level, n in self._levels.items() if (level in _TROUBLE) == trouble)
        self._levels[verdict.level] += 1
        self._first.setdefault(verdict.level, folder)
        return told < TOLD

    def sum_up(self, folder: str) -> None:
        """Print how many runs of which verdict are in ``folder``, unless all have been told of."""
        if self._begun <= TOLD:
            return
        counts = (f"{n:,} {badge}" for level, badge in BADGES.items() if (n := self._levels[level]))
        lines = [f"monitor: {self._levels.total():,} trainings recorded: {', '.join(counts)}"]
        worst = next((self._first[level] for level in _TROUBLE if level in self._first), None)
        lines += [f"  monitor inspect {path}" for path in (folder, worst) if path is not None]
        with suppress(OSError, ValueError, AttributeError):  # there is nobody to be told
            sys.stderr.write("\n".join(["", *lines, ""]))
            sys.stderr.flush()
