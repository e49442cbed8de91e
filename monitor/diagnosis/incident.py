"""Findings that overlap in time are one incident, and its head is the one that began first."""

from __future__ import annotations

from collections.abc import Iterable

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
    troubles = _overlapping([f for f in timed if f.severity != "info"])
    notes, joined = [f for f in timed if f.severity == "info"], -1
    while joined:
        homes = [(f, next((g for g in troubles if _meet(g, f)), None)) for f in notes]
        for f, home in homes:
            if home is not None:
                home.append(f)
        notes, joined = [f for f, home in homes if home is None], sum(home is not None for _, home in homes)
    incidents = [_incident(g) for g in (*groups, *troubles, *_overlapping(notes))]
    return sorted(incidents, key=lambda i: (-SEVERITIES.index(i.severity), place(i.head)))


def together(findings: Iterable[Finding]) -> list[tuple[Finding, int]]:
    """Findings of one rule as the first of them and the number of others, in the order of the first ones."""
    first: dict[str, Finding] = {}
    others: dict[str, int] = {}
    for f in findings:
        first.setdefault(f.rule, f)
        others[f.rule] = others.get(f.rule, -1) + 1
    return [(f, others[rule]) for rule, f in first.items()]


def _meet(group: list[Finding], f: Finding) -> bool:
    """True if ``f``, which begins no earlier than any of ``group`` or is information, is near one of its findings."""
    return any(
        f.attempt == g.attempt and f.first_step <= g.last_step + SLACK and g.first_step <= f.last_step + SLACK
        for g in group
    )


def _overlapping(ordered: list[Finding]) -> list[list[Finding]]:
    groups: list[list[Finding]] = []
    for f in ordered:
        if groups and _meet(groups[-1], f):
            groups[-1].append(f)
        else:
            groups.append([f])
    return groups


def _incident(group: list[Finding]) -> Incident:
    severity = SEVERITIES[max(SEVERITIES.index(f.severity) for f in group)]
    head, *rest = sorted(group, key=lambda f: (f.severity == "info" != severity, place(f)))
    return Incident(head, tuple(rest), severity)
