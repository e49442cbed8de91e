"""One sentence on a run: what is wrong, since when, and what it led to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from monitor.diagnosis.finding import Finding, Incident, Verdict
from monitor.diagnosis.incident import group
from monitor.rule import load_rules

#: Sites whose modules a person knows by name; elsewhere the title says enough.
_NAMED = ("input", "activation", "attention", "router", "gradient", "update", "parameter", "state")

#: Evidence that names what went before the head, and how the sentence says it.
_AFTER = {"learning_rate_factor": ", after the learning rate had been raised {:.3g}-fold"}


def verdict(
    findings: Iterable[Finding], unjudged: Mapping[str, str], steps: int, inapplicable: Iterable[str] = ()
) -> Verdict:
    """The verdict on what was found.

    Args:
        findings: all findings of the run.
        unjudged: rules that could not decide -> why.
        steps: number of recorded steps.
        inapplicable: those of ``unjudged`` that judge what the run does not have; they are not counted.
    """
    rules = load_rules()
    incidents = tuple(group(findings))
    recorded = f"{steps:,} step{'s' if steps != 1 else ''}"
    beside = tuple(r for r in inapplicable if r in unjudged)
    judged, thin = len(rules) - len(unjudged), len(unjudged) - len(beside)
    if incidents:
        worst, more = incidents[0], len(incidents) - 1
        text = sentence(worst)
        if worst.severity == "info":
            text = f"No problem found in {recorded}; worth knowing: {_lower(text)}"
        if more:
            text += f" {more} more incident{'s' if more > 1 else ''}."
        return Verdict(worst.severity, text, incidents, dict(unjudged), beside)
    if all(r.id in unjudged for r in rules.values() if r.check is not None):
        text = f"Not enough evidence: {recorded} recorded, and no rule could be judged."
        return Verdict("not_enough_evidence", text, incidents, dict(unjudged), beside)
    rest = f"; {thin} had not enough evidence" if thin else ""
    text = f"No problem found in {recorded} ({judged} rule{'s' if judged != 1 else ''} judged{rest})."
    return Verdict("healthy", text, incidents, dict(unjudged), beside)


def sentence(incident: Incident) -> str:
    """One incident in one sentence: its head, then what followed from it, each rule once."""
    head = incident.head
    follows: dict[str, list[Finding]] = {}
    for f in incident.consequences:
        if f.severity != "info" or head.severity == "info":
            follows.setdefault(f.rule, []).append(f)
    text = f"{head.title}{_where([head, *follows.pop(head.rule, [])])}"
    rule = load_rules().get(head.rule)  # none if the finding was stored by another version, or made up
    if rule is not None and rule.audit is not None:
        return f"{text}."
    if head.open:
        text += f" from step {head.first_step:,} on"
    else:
        text += _at(head)
    text += "".join(form.format(head.evidence[name]) for name, form in _AFTER.items() if name in head.evidence)
    led: dict[str, list[str]] = {}
    for found in follows.values():
        first = found[0]
        when = "the same step" if first.first_step == head.first_step else f"step {first.first_step:,}"
        led.setdefault(when, []).append(f"{_lower(first.title)}{_where(found, ' ({})')}")
    if led:
        # states that overlap, such as memorising and a softmax close to collapse, need not cause each other
        word = "then" if head.severity == "info" else "it led to"
        text += f"; {word} {_and([f'{_and(what)} at {when}' for when, what in led.items()])}"
    return f"{text}."


def _at(f: Finding) -> str:
    if f.first_step == f.last_step:
        return f" at step {f.first_step:,}"
    return f" in steps {f.first_step:,}–{f.last_step:,}"


def _where(found: list[Finding], form: str = " in {}") -> str:
    """The first module and how many others of its site, or nothing where the title says enough."""
    first = found[0]
    rule = load_rules().get(first.rule)
    elsewhere = rule is not None and first.site != rule.site  # a rule that looks at several sites: say which
    if first.site not in _NAMED or not first.module:
        return form.format(f"the {first.site}") if elsewhere else ""
    others = len({f.module for f in found if f.site == first.site}) - 1
    name = f"the {first.site} of {first.module}" if elsewhere else first.module
    return form.format(f"{name} and {others} more" if others else name)


def _and(parts: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
