"""What a diagnosis consists of: findings (one episode each), incidents (findings with one head), the verdict."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from monitor.rule import Severity


@dataclass(frozen=True)
class Finding:
    """One episode of one rule in one module.

    Attributes:
        rule, title, severity, site, module: what, how bad and where ("" is the whole run).
        attempt: which attempt of the run (0 unless it was resumed).
        first_step, last_step, peak_step: when. ``first_step`` is the first broken step of the episode.
        open: the episode was still going on at the last recorded step.
        count: broken points in the episode.
        value, threshold: at the peak.
        evidence: more numbers at the peak, name -> value.
        order: place of the module in order of execution, for ties.
    """

    rule: str
    title: str
    severity: Severity
    site: str
    module: str
    attempt: int
    first_step: int
    last_step: int
    peak_step: int
    open: bool
    count: int
    value: float
    threshold: float
    evidence: dict[str, float] = field(default_factory=dict)
    order: int = 0


@dataclass(frozen=True)
class Incident:
    """Findings that overlap in time. The head is the earliest by step, then site, then order of execution."""

    head: Finding
    consequences: tuple[Finding, ...]
    severity: Severity

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Head first, then the consequences in the same order."""
        return (self.head, *self.consequences)


@dataclass(frozen=True)
class Verdict:
    """The one sentence on a run.

    Attributes:
        level: the worst severity found; "healthy" if nothing was found; "not_enough_evidence" if nothing could be
            judged.
        text: one sentence for a person, plain text.
        incidents: worst first, then earliest.
        unjudged: rule -> why it could not decide ("12 of 100 points", "attn_entropy.entropy was not recorded").
        inapplicable: those of ``unjudged`` that judge what this run does not have: no attention, no router, …
    """

    level: Literal["healthy", "info", "warning", "critical", "not_enough_evidence"]
    text: str
    incidents: tuple[Incident, ...]
    unjudged: dict[str, str] = field(default_factory=dict)
    inapplicable: tuple[str, ...] = ()

    @property
    def thin(self) -> dict[str, str]:
        """Rules that would have decided, had there been more to judge -> what was missing."""
        return {rule: why for rule, why in self.unjudged.items() if rule not in self.inapplicable}
