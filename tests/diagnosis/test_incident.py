"""Findings into incidents, incidents into one sentence."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from monitor.diagnosis.engine import place
from monitor.diagnosis.finding import Finding
from monitor.diagnosis.incident import SLACK, group, together
from monitor.diagnosis.verdict import verdict
from monitor.rule import load_rules

RULES = load_rules()


def finding(rule: str, first: int, last: int | None = None, module: str = "", **changes: Any) -> Finding:
    r = RULES[rule]
    fields: dict[str, Any] = {
        "rule": rule, "title": r.title, "severity": r.severity, "site": r.site, "module": module, "attempt": 0,
        "first_step": first, "last_step": first if last is None else last, "peak_step": first, "open": False,
        "count": 1, "value": 9.0, "threshold": 1.0,
    }  # fmt: skip
    return Finding(**fields | changes)


COLLAPSE = finding("softmax_collapse", 1523, 1904, "cross_entropy", severity="critical")
DIVERGED = finding("divergence", 1893, 1950)


def test_overlap_is_one_incident() -> None:
    """Oracle: definition. The earliest is the head; what follows within the slack belongs to it."""
    spike = finding("gradient_spike", 1950 + SLACK, module="w")
    (incident,) = group([spike, DIVERGED, COLLAPSE])
    assert incident.head == COLLAPSE and incident.consequences == (DIVERGED, spike) and incident.severity == "critical"
    later = finding("gradient_spike", 1950 + SLACK + 1, module="w")
    assert [i.head for i in group([later, DIVERGED, COLLAPSE])] == [COLLAPSE, later]
    other = finding("loss_spike", 1600, attempt=1)
    assert len(group([COLLAPSE, other])) == 2


def test_head_of_one_step() -> None:
    """Oracle: definition. Site order decides within a step, then order of execution; backward runs from the end."""
    jump = finding("input_jump", 200, module="input[0]")
    spikes = [finding("gradient_spike", 200, module=m, order=o) for o, m in enumerate("ab")]
    loss = finding("loss_spike", 200)
    (incident,) = group([*reversed(spikes), loss, jump])
    assert incident.findings == (jump, loss, *spikes)
    broken = [finding("nonfinite", 5, 9, m, site="gradient", order=-1 - o) for o, m in enumerate("ab")]
    assert group(broken)[0].head.module == "b"


def test_information_neither_heads_nor_connects() -> None:
    """Oracle: definition. A note that lasts all run joins an incident that it overlaps, and leaves the others apart."""
    note = finding("softmax_collapse_approach", 100, 5000, "cross_entropy")
    spike = finding("loss_spike", 300)
    incidents = group([note, spike, COLLAPSE])
    assert [i.head for i in incidents] == [COLLAPSE, spike]
    assert incidents[1].findings == (spike, note)
    assert group([note])[0].head == note


def test_information_leads_to_an_incident_through_other_information() -> None:
    """Oracle: definition. What was over before the trouble began tells how it came, if something lasted in between."""
    earlier = finding("naive_loss_minimisation", 100, 900, "cross_entropy")
    between = finding("softmax_collapse_approach", 800, COLLAPSE.first_step, "cross_entropy")
    incidents = group([earlier, between, COLLAPSE])
    assert [i.findings for i in incidents] == [(COLLAPSE, earlier, between)]
    assert [i.head for i in group([earlier, COLLAPSE])] == [COLLAPSE, earlier]


def test_facts_are_incidents_of_their_own() -> None:
    """Oracle: definition. All forgotten parameters are one incident, apart from what happened at the first steps."""
    lost = [finding("unoptimized_parameter", 0, 2000, m, order=i, open=True) for i, m in enumerate("xyz")]
    incidents = group([*lost, finding("loss_spike", 30)])
    assert [len(i.findings) for i in incidents] == [3, 1]
    assert verdict(lost, {}, 2000).text == "Trainable parameter in no optimizer in x and 2 more."


@given(st.permutations([COLLAPSE, DIVERGED, *(finding("loss_spike", 40 * i) for i in range(9))]))
def test_the_order_of_findings_does_not_matter(findings: list[Finding]) -> None:
    """Oracle: invariance. Incidents do not depend on the order in which findings come."""
    assert group(findings) == group(sorted(findings, key=lambda f: f.first_step))


def naive(findings: list[Finding]) -> list[tuple[Finding, ...]]:
    """The definition, pair by pair: rounds in which information joins the first incident that it was near before."""

    def near(group: list[Finding], f: Finding) -> bool:
        return any(
            f.attempt == g.attempt and max(f.first_step, g.first_step) - min(f.last_step, g.last_step) <= SLACK
            for g in group
        )

    def chain(ordered: list[Finding]) -> list[list[Finding]]:
        groups: list[list[Finding]] = []
        for f in ordered:
            if groups and near(groups[-1], f):
                groups[-1].append(f)
            else:
                groups.append([f])
        return groups

    ordered = sorted(findings, key=place)
    groups = chain([f for f in ordered if f.severity != "info"])
    notes = [f for f in ordered if f.severity == "info"]
    while True:
        homes = [next((i for i, g in enumerate(groups) if near(g, f)), None) for f in notes]
        for f, home in zip(notes, homes, strict=True):
            if home is not None:
                groups[home].append(f)
        rest = [f for f, home in zip(notes, homes, strict=True) if home is None]
        if len(rest) == len(notes):
            break
        notes = rest
    return [tuple(sorted(g, key=place)) for g in (*groups, *chain(notes))]


EPISODES = st.tuples(
    st.sampled_from(["loss_spike", "softmax_collapse_approach", "naive_loss_minimisation", "divergence"]),
    st.integers(0, 600),
    st.integers(0, 90),
    st.integers(0, 1),
)


@given(st.lists(EPISODES, max_size=40))
@example([("naive_loss_minimisation", 30 * i, 15, 0) for i in range(12)] + [("divergence", 33 * 5, 0, 0)])
def test_incidents_as_defined(episodes: list[tuple[str, int, int, int]]) -> None:
    """Oracle: naive transcription. Each finding against each other one, in rounds."""
    found = [
        finding(rule, first, first + length, module=str(i), attempt=attempt)
        for i, (rule, first, length, attempt) in enumerate(episodes)
    ]
    ours = {frozenset(f.module for f in i.findings) for i in group(found)}
    assert ours == {frozenset(f.module for f in g) for g in naive(found)}


def test_many_findings() -> None:
    """Oracle: invariance. Ten times as many that lead one to the next, from a warning on, in time of the same order."""

    def seconds(n: int) -> float:
        chain = [finding("naive_loss_minimisation", 30 * i, 30 * i + 15, str(i)) for i in range(n)]
        began = time.process_time()
        (incident,) = group([*chain, finding("divergence", 30 * n)])
        assert len(incident.findings) == n + 1
        return time.process_time() - began

    assert seconds(5_000) < 40 * min(seconds(500) for _ in range(3))


@pytest.mark.parametrize(
    ("findings", "level", "text"),
    [
        (
            [COLLAPSE, DIVERGED],
            "critical",
            "Softmax collapse in steps 1,523–1,904; it led to divergence at step 1,893.",
        ),
        (
            [finding("softmax_collapse", 1523, 1999, "cross_entropy", open=True)],
            "warning",
            "Softmax collapse from step 1,523 on.",
        ),
        (
            [finding("loss_spike", 50), finding("loss_spike", 900), finding("loss_spike", 500)],
            "warning",
            "Loss spike at step 50. 2 more incidents.",
        ),
        (
            [
                finding("nonfinite", 7, 9, "last.weight", site="gradient", order=-2, open=True),
                finding("nonfinite", 7, 9, "first.weight", site="gradient", order=-1, open=True),
                finding("nonfinite", 7, 9, "first.weight", site="parameter", open=True),
                finding("nonfinite", 8, 9, "", site="loss", open=True),
            ],
            "critical",
            "Non-finite value in the gradient of last.weight and 1 more from step 7 on.",
        ),
        ([finding("nonfinite", 7, site="loss")], "critical", "Non-finite value in the loss at step 7."),
        (
            [finding("softmax_collapse_approach", 900, 1999, "cross_entropy", open=True)],
            "info",
            "No problem found in 2,000 steps; worth knowing: softmax close to collapse from step 900 on.",
        ),
        ([], "healthy", f"No problem found in 2,000 steps ({len(RULES) - 1} rules judged; 1 had not enough evidence)."),
    ],
)
def test_text(findings: list[Finding], level: str, text: str) -> None:
    """Oracle: golden. One plain sentence."""
    told = verdict(findings, {"input_jump": "not enough evidence"}, 2000)
    assert (told.level, told.text) == (level, text)
    assert told.unjudged == {"input_jump": "not enough evidence"}


def test_rules_that_do_not_apply_are_not_counted() -> None:
    """Oracle: golden. Of three rules that did not decide, one looked for something the run does not have."""
    unjudged = {"input_jump": "thin", "load_imbalance": "not applicable", "loss_spike": "thin"}
    told = verdict([], unjudged, 2000, ("load_imbalance",))
    assert told.text.endswith(f"({len(RULES) - 3} rules judged; 2 had not enough evidence).")
    assert told.thin == {"input_jump": "thin", "loss_spike": "thin"}
    assert told.unjudged == unjudged
    only = verdict([], {"load_imbalance": "not applicable"}, 2000, ("load_imbalance",))
    assert only.text.endswith(f"({len(RULES) - 1} rules judged).")


def test_together() -> None:
    """Oracle: closed form. One entry a rule, the first finding of it and how many others there are."""
    a, b, c = (finding("gradient_spike", s, module=m) for s, m in ((3, "a"), (3, "b"), (5, "a")))
    spike = finding("loss_spike", 4)
    assert together([a, b, spike, c]) == [(a, 2), (spike, 0)]
    assert together([]) == []


def test_a_rule_that_is_not_known() -> None:
    """Oracle: planted fault. A finding of another version is told by its title, also as a consequence."""
    gone = replace(finding("gradient_spike", 30, 40, "layer"), rule="gone", title="Gone")
    assert verdict([gone], {}, 100).text == "Gone in layer in steps 30–40."
    both = verdict([finding("input_jump", 25, module="input[0]", site="input"), gone], {}, 100)
    assert both.text == "Input jump in input[0] at step 25; it led to gone (layer) at step 30."


def test_not_enough_evidence() -> None:
    """Oracle: definition. No rule over series judged, nothing found: that is not health."""
    unjudged = {r.id: "why" for r in RULES.values() if r.check is not None}
    told = verdict([], unjudged, 1)
    assert told.level == "not_enough_evidence"
    assert told.text == "Not enough evidence: 1 step recorded, and no rule could be judged."
