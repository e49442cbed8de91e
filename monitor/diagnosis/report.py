"""The diagnosis of a recorded run: what was found while recording, continued or computed afresh, and told in words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from monitor.block import ColumnBlock
from monitor.diagnosis.engine import Engine, rules_hash
from monitor.diagnosis.finding import Finding, Verdict
from monitor.diagnosis.verdict import verdict
from monitor.rule import Rule, load_rules

if TYPE_CHECKING:
    from monitor.store.run import Run

#: Values held at a time while a run is folded afresh: about 100 MB.
_VALUES = 10_000_000


def report(run: Run, recompute: bool = False) -> Verdict:
    """The verdict on a run.

    Findings stored by the recorder are taken over if they come from the same rules, and continued over the steps that
    were recorded since; otherwise the whole run is folded again. Both give the same.

    Args:
        run: an opened run.
        recompute: fold again whatever is stored.
    """
    rules = load_rules()
    engine = _after(run, rules, max(run.attempts, 1), None if recompute else _stored(run, rules))
    return verdict(engine.findings(), engine.unjudged(), run.steps, engine.inapplicable())


def judged(run: Run, rules: Mapping[str, Rule], attempts: int) -> dict[str, Any] | None:
    """The state of an engine that has seen the first ``attempts`` of a run; None if those were not judged by ``rules``.

    For a recording that goes on: findings of earlier attempts are kept, and nobody has to fold the whole run again.
    """
    engine = _stored(run, rules)
    return None if engine is None else _after(run, rules, attempts, engine).state()


def _after(run: Run, rules: Mapping[str, Rule], attempts: int, engine: Engine | None) -> Engine:
    """An engine that has seen the first ``attempts``; ``engine`` has seen some of them."""
    first = 0 if engine is None else engine.attempt
    for attempt in range(first, attempts):
        if engine is None or engine.attempt != attempt:
            engine = Engine(rules, run.facts, attempt, None if engine is None else engine.state())
        for blocks in _blocks(run, rules, attempt, engine.last_step):
            engine.feed(blocks)
    assert engine is not None
    return engine


def _stored(run: Run, rules: Mapping[str, Rule]) -> Engine | None:
    """The recorder's engine as it was last stored, None if it had other rules or did not see every attempt."""
    stored = run.stored_findings()
    if stored is None or stored.rules_hash != rules_hash(rules):
        return None
    try:
        attempt = int(stored.state["attempt"])
        if stored.state["attempts"] != list(range(attempt + 1)):
            return None
        return Engine(rules, run.facts, attempt, stored.state)
    except (
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
    ):  # written by something else: what was recorded still tells everything
        return None


def _blocks(run: Run, rules: Mapping[str, Rule], attempt: int, after: int | None) -> Iterator[list[ColumnBlock]]:
    """What the rules need of one attempt, recorded after a step, in pieces that fit the memory."""
    recorded = {f"{metric}.{column}" for metric, columns in run.metrics().items() for column in columns}
    refs = sorted({n for r in rules.values() for n in r.needs} & recorded)
    last = run.last_step_of(attempt)
    if not refs or last is None or run.first_step is None:
        return
    rows = max(_VALUES // sum(len(run.modules(r)) for r in refs), 1000)
    for first in range(run.first_step if after is None else after + 1, last + 1, rows):
        piece = []
        for ref in refs:
            b = run.block(ref, first=first, last=min(first + rows - 1, last), attempt=attempt)
            metric, column = ref.split(".")
            piece.append(ColumnBlock(metric, column, b.steps, b.modules, b[ref], b.has(ref)))
        yield piece


def describe(finding: Finding, rule: Rule | None = None) -> str:
    """A finding in words: what happened, its numbers at the worst step, the threshold and where that comes from.

    Args:
        finding: any finding, also of a rule that this version does not have.
        rule: its rule; looked up without.

    Returns:
        One paragraph. Names in it are as recorded: escape them where they are shown.
    """
    rule = rule or load_rules().get(finding.rule)
    evidence = finding.evidence
    if rule is None:
        return f"{finding.title}. {_numbers(evidence | {'value': finding.value})}; threshold {finding.threshold:.4g}."
    words: dict[str, Any] = {
        **evidence,
        "module": finding.module or "the run",
        "site": finding.site,
        "step": f"{finding.first_step:,}",
        "value": finding.value,
        "threshold": finding.threshold,
    }
    try:
        text = rule.message.format(**words)
    except (KeyError, ValueError):  # evidence of an older version of the rule
        text = f"{finding.title}: {finding.value:.4g}."
    rest = {name: number for name, number in evidence.items() if f"{{{name}" not in rule.message}
    limit, source = _threshold(finding, rule.params)
    doubt = "Experimental rule. " if rule.experimental else ""
    return f"{doubt}{text} {_numbers(rest)}{'; t' if rest else 'T'}hreshold {limit} ({source})."


def _threshold(finding: Finding, params: Sequence[Any]) -> tuple[str, str]:
    """The threshold with its unit, and where it comes from: the parameter it equals, or the rule's first."""
    for p in params:
        if math.isclose(p.value, finding.threshold):
            return f"{finding.threshold:.4g} {'' if p.unit == '1' else p.unit}".strip(), p.source
    return f"{finding.threshold:.4g}", params[0].source if params else "of the rule"


def _numbers(numbers: Mapping[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {number:.4g}" for name, number in numbers.items()).capitalize()
