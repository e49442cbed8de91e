"""What a rule is: a decision on recorded series (never on tensors) that says what is wrong, where and since when.

A rule is one file in ``monitor/rules`` whose name is the rule's id and which defines ``RULE``. Its module docstring has
four headings (*What it means · How it is decided · What to do · When it is wrong*) and is what ``monitor explain`` and
RULES.md print. Rules are folds: ``check`` looks at a window of steps and marks those that break the rule; the engine in
``monitor/diagnosis`` joins marks into episodes, so that the same rule serves a live run and an old one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from monitor.errors import MetricError
from monitor.metric import SITES, Array, Block, Mask, walk

Severity = Literal["info", "warning", "critical"]
SEVERITIES: tuple[Severity, ...] = ("info", "warning", "critical")
HEADINGS = ("What it means", "How it is decided", "What to do", "When it is wrong")


@dataclass(frozen=True)
class Param:
    """A threshold or window of a rule, with where it comes from (a citation, or the calibration that set it)."""

    name: str
    value: float
    unit: str
    source: str


@dataclass(frozen=True)
class Remedy:
    """Something to do. ``import_path`` names code of this library that does it, where there is some."""

    text: str
    import_path: str = ""


@dataclass
class Hits:
    """The steps at which a rule is broken, for some modules.

    Attributes:
        steps: ``(step,)`` int64, increasing, of the first axis. Steps before ``Window.first`` are context and ignored.
        modules: names of the second axis.
        mask: ``(step, module)`` bool, True where the rule is broken.
        has: ``(step, module)`` bool, True where there was something to judge; other steps neither hold nor break an
            episode.
        value: ``(step, module)`` the number that was judged.
        threshold: what it was compared with, ``(step, module)`` or one number.
        evidence: more numbers that a reader needs, name -> ``(step, module)``.
        critical: where the rule is broken so badly that the finding is critical, whatever the rule's own severity.
        site: overrides the rule's site, for rules that look at several. A check gives at most one `Hits` per site.
        backward: the step reaches these modules in reverse order, as the backward pass does; decides which comes first.
    """

    steps: npt.NDArray[np.int64]
    modules: tuple[str, ...]
    mask: Mask
    has: Mask
    value: Array
    threshold: Array | float
    evidence: Mapping[str, Array] = field(default_factory=dict)
    critical: Mask | None = None
    site: str = ""
    backward: bool = False


class Window:
    """The series a rule asked for, over the steps it has to judge and up to ``lookback`` earlier ones.

    Series of different columns may have been recorded at different steps; ``window[ref]`` is a `Block` with the one
    name ``ref``, over that column's own steps and modules. A column nobody recorded gives a block with no modules.
    """

    def __init__(self, blocks: Mapping[str, Block], facts: Mapping[str, Any], first: int) -> None:
        self._blocks = blocks
        self.facts = facts
        self.first = first

    def __getitem__(self, ref: str) -> Block:
        block = self._blocks.get(ref)
        if block is None:
            empty = np.zeros((0, 0))
            block = Block(np.zeros(0, dtype=np.int64), (), {ref: empty})
        return block


@dataclass(frozen=True)
class FactHit:
    """A fact that breaks a rule, for one module."""

    module: str
    value: float
    threshold: float
    evidence: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Rule:
    """The definition of something that can go wrong.

    Attributes:
        id: file name and public name.
        title: the name of the trouble, as it is shown.
        severity: of its findings, unless a hit is marked critical.
        site: where in the step the trouble shows, one of `SITES`; orders causes within one step.
        message: one sentence with ``{value}``, ``{threshold}``, ``{module}``, ``{site}``, ``{step}`` and the names of
            evidence as `str.format` fields.
        refute: what observation would show the finding to be wrong.
        remedies: what to do, most useful first.
        params: thresholds and windows, each with its source.
        needs: columns it reads, as ``"metric.column"``, that of what it judges first; empty for a rule over facts.
        check: ``(Window, {param: value}) -> Hits…`` for a rule over series. Must depend on at most ``lookback``
            recorded points before the one it judges, and on nothing after it.
        audit: ``(facts, {param: value}) -> FactHit…`` for a rule over facts.
        lookback: recorded points of context that ``check`` needs.
        hold: consecutive broken points that make an episode.
        release: consecutive sound points that end one.
        experimental: True while the thresholds have neither a source nor a calibration; said in the output.
    """

    id: str
    title: str
    severity: Severity
    site: str
    message: str
    refute: str
    remedies: tuple[Remedy, ...]
    params: tuple[Param, ...]
    needs: tuple[str, ...] = ()
    check: Callable[[Window, Mapping[str, float]], Iterable[Hits]] | None = None
    audit: Callable[[Mapping[str, Any], Mapping[str, float]], Iterable[FactHit]] | None = None
    lookback: int = 0
    hold: int = 1
    release: int = 20
    experimental: bool = False
    doc: str = field(default="", compare=False)

    @property
    def values(self) -> dict[str, float]:
        """The parameters as a mapping from name to value."""
        return {p.name: p.value for p in self.params}


def check_rule(r: object, file: str) -> Rule:
    """Return ``r`` if it keeps the contract of a rule.

    Args:
        r: the object a file calls ``RULE``.
        file: where it stands, for the message.

    Raises:
        MetricError: naming the file and the clause that is broken.
    """

    def need(ok: bool, clause: str) -> None:
        if not ok:
            raise MetricError(f"{file}: {clause}")

    if not isinstance(r, Rule):
        raise MetricError(f"{file}: RULE is {type(r).__name__}, expected monitor.rule.Rule")
    need(r.severity in SEVERITIES, f"severity {r.severity!r} is none of {', '.join(SEVERITIES)}")
    need(r.site in SITES, f"site {r.site!r} is none of {', '.join(SITES)}")
    need(bool(r.needs) == (r.check is not None), "a rule over series has both needs and check")
    need((r.check is None) != (r.audit is None), "a rule has either check or audit")
    need(all(n.count(".") == 1 for n in r.needs), "needs are written 'metric.column'")
    need(all(p.source for p in r.params), "every parameter needs a source")
    need(r.hold >= 1 and r.release >= 1 and r.lookback >= 0, "hold and release are at least 1, lookback at least 0")
    need(bool(r.remedies and r.message and r.refute), "message, refute and remedies must say something")
    missing = [h for h in HEADINGS if h not in r.doc]
    need(not missing or sys.flags.optimize > 1, f"the module docstring lacks the heading {missing[:1]}")
    return r


def load_rules() -> dict[str, Rule]:
    """Every rule, by id, in alphabetical order: one per file of ``monitor/rules``.

    Raises:
        MetricError: if a file breaks the contract; the message names it.
    """
    import monitor.rules as package

    return dict(_load(tuple(package.__path__)))


@cache
def _load(path: tuple[str, ...]) -> dict[str, Rule]:
    # keyed by the package's path, so that a folder added to it is found without clearing anything
    import monitor.rules as package

    found: dict[str, Rule] = {}
    for name, module in walk(package):
        file = module.__file__ or name
        r = check_rule(getattr(module, "RULE", None), file)
        if r.id != name:
            raise MetricError(f"{file}: id {r.id!r} differs from the file name {name!r}")
        found[name] = r
    return found
