"""Findings that overlap in time are one incident, and its head is the one that began first."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from monitor.diagnosis.engine import place
from monitor.diagnosis.finding import Finding, Incident
from monitor.rule import SEVERITIES, load_rules

#: Steps that may lie between the end of one finding and the beginning of the next of the same incident. A consequence
#: shows within a few steps; this is also the number of sound points after which most rules call an episode over.
SLACK = 20


def group(findings: Iterable[Finding]) -> list[Incident]:
    """Incidents, worst first, then earliest.

    Two findings of one attempt belong together if they overlap or at most `SLACK` steps lie between them. Information
    joins an incident that it overlaps, also through other information in it, but neither heads nor connects incidents
    of warnings: it describes a state that may last for most of a run. Findings of a rule over facts have no step, so
    all of one rule are one incident.

    Args:
        findings: of any number of attempts, in any order.

    Returns:
        Incidents whose head is the earliest finding by step, then by site, then by the order in which the step reaches
        the modules, of those that are warnings or worse where there are any.
    """
    rules = load_rules()
    ordered = sorted(findings, key=place)
    about_facts = {f.rule for f in ordered if f.rule in rules and rules[f.rule].audit is not None}
    groups = [[f for f in ordered if f.rule == rule] for rule in sorted(about_facts)]
    timed = [f for f in ordered if f.rule not in about_facts]
    troubles = _overlapping(f for f in timed if f.severity != "info")
    notes = _join(troubles, [f for f in timed if f.severity == "info"])
    incidents = [_incident(g) for g in groups]
    incidents += [_incident(s.findings) for s in (*troubles, *_overlapping(notes))]
    return sorted(incidents, key=lambda i: (-SEVERITIES.index(i.severity), place(i.head)))


def together(findings: Iterable[Finding]) -> list[tuple[Finding, int]]:
    """Findings of one rule as the first of them and the number of others, in the order of the first ones."""
    first: dict[str, Finding] = {}
    others: dict[str, int] = {}
    for f in findings:
        first.setdefault(f.rule, f)
        others[f.rule] = others.get(f.rule, -1) + 1
    return [(f, others[rule]) for rule, f in first.items()]


@dataclass
class _Stretch:
    """Findings of one attempt, each near another: whatever reaches the steps from ``first`` to ``end`` is near one too.

    Attributes:
        first: the first step of any.
        end: the last step of any, and `SLACK` more.
    """

    findings: list[Finding]
    first: int
    end: int

    @classmethod
    def of(cls, f: Finding) -> _Stretch:
        return cls([f], f.first_step, f.last_step + SLACK)

    @property
    def attempt(self) -> int:
        return self.findings[0].attempt

    def add(self, f: Finding) -> None:
        self.findings.append(f)
        self.first, self.end = min(self.first, f.first_step), max(self.end, f.last_step + SLACK)


def _overlapping(ordered: Iterable[Finding]) -> list[_Stretch]:
    stretches: list[_Stretch] = []
    for f in ordered:
        if stretches and f.attempt == stretches[-1].attempt and f.first_step <= stretches[-1].end:
            stretches[-1].add(f)
        else:
            stretches.append(_Stretch.of(f))
    return stretches


class _Waiting:
    """Information in the order of its first or its last steps, looked up by step.

    Args:
        notes: findings of any number of attempts.
        step: the one to look them up by.
        taken: numbers of those that are passed over, again and again in no time.
    """

    def __init__(self, notes: Sequence[Finding], step: Callable[[Finding], int], taken: set[int]) -> None:
        self._keys = sorted((f.attempt, step(f), i) for i, f in enumerate(notes))
        self._next = list(range(1, len(notes) + 1))
        self._taken = taken

    def between(self, attempt: int, low: int, high: int) -> Iterator[int]:
        """Numbers of those from step ``low`` to step ``high``."""
        at = self._not_taken(bisect_left(self._keys, (attempt, low)))
        while at < len(self._keys) and self._keys[at] < (attempt, high + 1):
            yield self._keys[at][2]
            at = self._not_taken(at + 1)

    def _not_taken(self, at: int) -> int:
        passed = []
        while at < len(self._keys) and self._keys[at][2] in self._taken:
            passed.append(at)
            at = self._next[at]
        for i in passed:
            self._next[i] = at
        return at


def _join(troubles: Sequence[_Stretch], notes: Sequence[Finding]) -> list[Finding]:
    """Put each note into the first trouble that it is near, then what is near those, and so on; what is left of them.

    The troubles of an attempt follow each other, and so do the ends of those that have not grown yet.
    """
    taken: set[int] = set()
    by_first = _Waiting(notes, lambda f: f.first_step, taken)
    by_last = _Waiting(notes, lambda f: f.last_step, taken)
    ends = [(s.attempt, s.end) for s in troubles]
    found: dict[int, list[int]] = {}
    for i, f in enumerate(notes):
        home = bisect_left(ends, (f.attempt, f.first_step))
        if home < len(ends) and ends[home][0] == f.attempt and troubles[home].first <= f.last_step + SLACK:
            found.setdefault(home, []).append(i)
            taken.add(i)
    while found:
        before = {home: (troubles[home].first, troubles[home].end) for home in sorted(found)}
        for home, joined in found.items():
            for i in joined:
                troubles[home].add(notes[i])
        found = {}
        for home, (first, end) in before.items():
            s = troubles[home]
            # what was not near the stretch as it was lies on one side of it
            later = by_first.between(s.attempt, end + 1, s.end)
            earlier = by_last.between(s.attempt, s.first - SLACK, first - SLACK - 1)
            if near := {*later, *earlier}:
                found[home] = sorted(near)
                taken |= near
    return [f for i, f in enumerate(notes) if i not in taken]


def _incident(group: list[Finding]) -> Incident:
    severity = SEVERITIES[max(SEVERITIES.index(f.severity) for f in group)]
    head, *rest = sorted(group, key=lambda f: (f.severity == "info" != severity, place(f)))
    return Incident(head, tuple(rest), severity)
