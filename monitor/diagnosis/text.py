"""Words for a terminal: numbers as people read them, names made harmless, the few lines printed when a run ends.

What a run folder holds was written by somebody else's program: a module, a metric or an error may contain ANSI escapes,
line breaks or characters that turn the direction of writing. Everything shown goes through `plain`.
"""

from __future__ import annotations

import math
from os import PathLike
from typing import TYPE_CHECKING

from monitor.diagnosis.finding import Finding, Verdict
from monitor.diagnosis.report import describe
from monitor.rule import Rule, load_rules

if TYPE_CHECKING:
    from monitor.store.run import Run

#: How a level is written: a shape and a word, so that nothing rests on colour.
BADGES: dict[str, str] = {
    "healthy": "● HEALTHY",
    "info": "◆ INFO",
    "warning": "▲ WARNING",
    "critical": "■ CRITICAL",
    "not_enough_evidence": "○ NOT ENOUGH EVIDENCE",
}
_SHOWN = 2  # incidents in the short form; the rest are counted


def plain(text: object, width: int | None = None) -> str:
    r"""``text`` on one line without anything a terminal would act on.

    Args:
        text: anything; its `str` is shown.
        width: longest result, in characters; the middle is replaced by "…", because both ends of a dotted name matter.

    Returns:
        Every character that does not print (control, direction, zero width, lone surrogate) as its escape, "\x1b".
    """
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    if width is None or len(shown) <= width:
        return shown
    tail = (width - 1) // 2
    return f"{shown[: width - 1 - tail]}…{shown[len(shown) - tail :]}"


def number(value: float) -> str:
    """``value`` in at most four significant digits: ``1,440``, ``0.3512``, ``1.23e-08``, ``nan``, ``-inf``."""
    if not math.isfinite(value):
        return str(float(value))
    size = abs(value)
    if value == int(value) and size < 1e7:
        return f"{int(value):,}"
    if size >= 1e7 or size < 1e-3:
        return f"{value:.3g}"
    return f"{value:,.0f}" if size >= 1e3 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """``seconds`` in the two largest units that say something: ``16.2 s``, ``4 min 10 s``, ``2 h 31 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    for unit, size, small, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if seconds >= size:
            whole, rest = divmod(int(seconds), size)
            return f"{whole} {unit} {rest // part} {small}"
    raise AssertionError("unreachable")


def place(finding: Finding) -> str:
    """Where a finding is: its module, or "the whole run"."""
    return plain(finding.module, 60) if finding.module else "the whole run"


def when(finding: Finding, rule: Rule | None) -> str:
    """The steps of a finding: ``step 200``, ``steps 1,512–1,998``, ``since step 1,512``; of a fact, that it is one."""
    if rule is not None and rule.audit is not None:
        return "in the wiring"
    if finding.open:
        return f"since step {finding.first_step:,}"
    if finding.first_step == finding.last_step:
        return f"step {finding.first_step:,}"
    return f"steps {finding.first_step:,}–{finding.last_step:,}"


def summary_lines(source: Run | Verdict, path: str | PathLike[str]) -> list[str]:
    """What is printed when a run ends: the verdict, the head of its worst incidents with a remedy, the next command.

    Args:
        source: a run or its verdict.
        path: the run folder, for the command.

    Returns:
        2 to 8 lines of plain text without control characters.
    """
    verdict = source if isinstance(source, Verdict) else source.verdict()
    rules = load_rules()
    lines = [f"monitor: {BADGES[verdict.level]} · {plain(verdict.text)}"]
    for incident in verdict.incidents[:_SHOWN]:
        head = incident.head
        rule = rules.get(head.rule)
        lines.append(f"  {when(head, rule)} · {place(head)} · {plain(describe(head, rule))}")
        if rule is not None:
            remedy = rule.remedies[0]
            lines.append(f"  do: {remedy.text}" + (f" ({remedy.import_path})" if remedy.import_path else ""))
    if len(verdict.incidents) > _SHOWN:
        lines.append(f"  … and {len(verdict.incidents) - _SHOWN} more")
    return [*lines, f"  monitor inspect {plain(path)}"]
