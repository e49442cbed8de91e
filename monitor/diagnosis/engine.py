"""The fold: recorded columns in, findings out, whatever the pieces in which they arrive.

A rule marks points; this engine keeps as much history as each rule needs, joins marked points into episodes (``hold``
consecutive broken points begin one, ``release`` consecutive sound points end it) and can be stopped and continued at
any step. The same code runs in the writer thread of a training and over an old run, and gives the same findings.
"""

from __future__ import annotations

import base64
import hashlib
import linecache
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from monitor.block import ColumnBlock
from monitor.diagnosis.finding import Finding
from monitor.metric import SITES, Block, Mask
from monitor.rule import SEVERITIES, Hits, Rule, Window


class _History:
    """The last recorded rows of one column. Modules keep the place at which they first appeared.

    Values are float32, as runs store them: so what is found live and what is found in the stored run are the same.
    """

    def __init__(self) -> None:
        self.modules: tuple[str, ...] = ()
        self.steps = np.zeros(0, dtype=np.int64)
        self.values: npt.NDArray[np.float32] = np.zeros((0, 0), dtype=np.float32)
        self.has: Mask = np.zeros((0, 0), dtype=np.bool_)

    def append(self, block: ColumnBlock, first: int) -> None:
        """Add the rows of ``block`` from step ``first`` on in which anything was recorded."""
        rows = (block.steps >= first) & block.has.any(axis=1)
        if not rows.any():
            return
        with np.errstate(over="ignore"):
            values, has = block.values[rows].astype(np.float32), block.has[rows]
        if block.modules != self.modules:
            place = {m: i for i, m in enumerate(dict.fromkeys((*self.modules, *block.modules)))}
            wider = ((0, 0), (0, len(place) - len(self.modules)))
            self.modules = tuple(place)
            self.values, self.has = np.pad(self.values, wider, constant_values=np.nan), np.pad(self.has, wider)
            at, narrow = [place[m] for m in block.modules], (values, has)
            values, has = (
                np.full((len(values), len(place)), np.nan, dtype=np.float32),
                np.zeros((len(values), len(place)), dtype=np.bool_),
            )
            values[:, at], has[:, at] = narrow
        self.steps = np.concatenate([self.steps, block.steps[rows]])
        # always in the same memory order: numpy's log and exp differ in the last bit between contiguous and strided
        self.values = np.concatenate([self.values, np.ascontiguousarray(values)])
        self.has = np.concatenate([self.has, has])

    def block(self, ref: str, first: int, lookback: int) -> Block:
        """The rows from step ``first`` on, and ``lookback`` earlier ones."""
        start = max(int(np.searchsorted(self.steps, first)) - lookback, 0)
        return Block(
            self.steps[start:], self.modules, {ref: self.values[start:].astype(np.float64)}, {ref: self.has[start:]}
        )

    def trim(self, keep: int) -> None:
        if len(self.steps) > keep:
            rows = slice(len(self.steps) - keep, None)
            self.steps, self.values, self.has = self.steps[rows], self.values[rows], self.has[rows]

    def state(self) -> dict[str, Any]:
        return {
            "modules": list(self.modules),
            "steps": _pack(self.steps),
            "values": _pack(self.values),
            "has": _pack(np.packbits(self.has)),
        }

    @staticmethod
    def restored(state: Mapping[str, Any]) -> _History:
        h = _History()
        h.modules = tuple(map(str, state["modules"]))
        h.steps = _unpack(state["steps"], np.int64)
        shape = len(h.steps), len(h.modules)
        h.values = _unpack(state["values"], np.float32).reshape(shape)
        bits = np.unpackbits(_unpack(state["has"], np.uint8), count=shape[0] * shape[1])
        h.has = bits.astype(np.bool_).reshape(shape)
        return h


@dataclass
class _Episode:
    """Consecutive broken points of one rule at one site and module; a finding once there have been ``hold`` of them."""

    rule: str
    site: str
    module: str
    order: int
    first_step: int
    opened: bool = False
    critical: bool = False
    last_step: int = 0
    count: int = 0
    sound: int = 0
    score: float = -1.0
    peak_step: int = 0
    value: float = 0.0
    threshold: float = 0.0
    evidence: dict[str, float] = field(default_factory=dict)


class Engine:
    """Folds recorded columns into findings.

    Args:
        rules: the rules to apply, by id.
        facts: what is known without tensors (``run.json["facts"]``); may be replaced when more is known.
        attempt: which attempt of the run is fed.
        state: what `state` returned. That of an earlier attempt keeps its findings and begins the series afresh.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: if ``state`` is something else.
    """

    def __init__(
        self,
        rules: Mapping[str, Rule],
        facts: Mapping[str, Any],
        attempt: int = 0,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.facts = facts
        self.attempt = attempt
        self._attempts = [attempt]
        self._rules = dict(rules)
        self._history: dict[str, _History] = {}
        self._episodes: dict[tuple[str, str], dict[str, _Episode]] = {}
        self._closed: list[Finding] = []
        self._judged: dict[str, int] = {}
        self._failed: dict[str, str] = {}
        self._last: int | None = None
        self._keep: dict[str, int] = {}
        for rule in rules.values():
            for ref in rule.needs:
                self._keep[ref] = max(self._keep.get(ref, 1), rule.lookback)
        if state is not None:
            self._restore(state)

    @property
    def facts(self) -> Mapping[str, Any]:
        """What is known without tensors."""
        return self._facts

    @facts.setter
    def facts(self, facts: Mapping[str, Any]) -> None:
        self._facts = facts
        try:
            self._order = {q["name"]: i for i, q in enumerate(facts.get("parameters", ()))}
        except (AttributeError, KeyError, TypeError):  # of a damaged run; modules then stand as they first appeared
            self._order = {}

    @property
    def last_step(self) -> int | None:
        """The last step that was fed in this attempt, None before the first."""
        return self._last

    def feed(self, blocks: Iterable[ColumnBlock]) -> None:
        """Judge more steps.

        Args:
            blocks: everything that was recorded in a range of steps, in order of steps. Steps up to the last one of an
                earlier call are ignored, so that a caller may be unsure where the last one ended.

        A rule whose check fails is not applied any more and says so in `unjudged`; the others go on.
        """
        blocks = [b for b in blocks if len(b.steps)]
        if not blocks:
            return
        first = self._last + 1 if self._last is not None else min(int(b.steps[0]) for b in blocks)
        last = max(int(b.steps[-1]) for b in blocks)
        if last < first:
            return
        fresh = set()
        for b in blocks:
            if b.ref in self._keep and b.steps[-1] >= first:
                self._history.setdefault(b.ref, _History()).append(b, first)
                fresh.add(b.ref)
        for rule in self._rules.values():
            if rule.check is not None and rule.id not in self._failed and not fresh.isdisjoint(rule.needs):
                self._judge(rule, first)
        for ref in fresh:
            self._history[ref].trim(self._keep[ref])
        self._last = last

    def _judge(self, rule: Rule, first: int) -> None:
        assert rule.check is not None
        known = {n: self._history[n].block(n, first, rule.lookback) for n in rule.needs if n in self._history}
        sites = set()
        try:
            with np.errstate(all="ignore"):
                for hits in rule.check(Window(known, self.facts, first), rule.values):
                    site = hits.site or rule.site
                    if site in sites:
                        raise ValueError(f"it gave two Hits for site {site!r}, expected one per site")
                    sites.add(site)
                    self._mark(rule, site, hits, first)
        except Exception as e:  # a broken rule must not take the others with it, nor the training
            self._failed[rule.id] = f"its check failed in the block from step {first} on: {type(e).__name__}: {e}"

    def _mark(self, rule: Rule, site: str, hits: Hits, first: int) -> None:
        start = int(np.searchsorted(hits.steps, first))
        has = hits.has[start:]
        self._judged[rule.id] = self._judged.get(rule.id, 0) + int(np.count_nonzero(has))
        broken = hits.mask[start:] & has
        running = self._episodes.setdefault((rule.id, site), {})
        touched = set(np.flatnonzero(broken.any(axis=0)).tolist())
        if running:
            touched.update(i for i, m in enumerate(hits.modules) if m in running)
        for i in sorted(touched):
            rows = start + np.flatnonzero(has[:, i])
            marks = hits.mask[rows, i]
            # runs of equal marks, so that a long episode costs no more than a short one
            ends = [*(np.flatnonzero(np.diff(marks)) + 1).tolist(), len(marks)]
            begin = 0
            for end in ends:
                if end == begin:
                    continue
                if marks[begin]:
                    self._broken(rule, site, hits, i, rows[begin:end], running)
                else:
                    self._sound(rule, hits.modules[i], end - begin, running)
                begin = end

    def _broken(
        self, rule: Rule, site: str, hits: Hits, i: int, rows: npt.NDArray[np.int64], running: dict[str, _Episode]
    ) -> None:
        module = hits.modules[i]
        episode = running.get(module)
        if episode is None:
            order = self._order.get(module, i)
            order = -1 - order if hits.backward else order
            episode = running[module] = _Episode(rule.id, site, module, order, int(hits.steps[rows[0]]))
        value = hits.value[rows, i]
        threshold = np.broadcast_to(hits.threshold, hits.value.shape)[rows, i]
        # worst relative to what it was compared with; nothing is worse than a non-finite value
        score = np.abs(value - threshold) / np.where(threshold == 0, 1.0, np.abs(threshold))
        score[~np.isfinite(score)] = np.inf
        peak = int(np.argmax(score))
        if score[peak] > episode.score:
            row = rows[peak]
            episode.score, episode.peak_step = float(score[peak]), int(hits.steps[row])
            episode.value, episode.threshold = float(value[peak]), float(threshold[peak])
            evidence = {name: float(numbers[row, i]) for name, numbers in hits.evidence.items()}
            episode.evidence = {name: number for name, number in evidence.items() if not math.isnan(number)}
        episode.critical |= hits.critical is not None and bool(hits.critical[rows, i].any())
        episode.last_step = int(hits.steps[rows[-1]])
        episode.count += len(rows)
        episode.sound = 0
        episode.opened |= episode.count >= rule.hold

    def _sound(self, rule: Rule, module: str, points: int, running: dict[str, _Episode]) -> None:
        episode = running.get(module)
        if episode is None:
            return
        episode.sound += points
        if not episode.opened:
            del running[module]
        elif episode.sound >= rule.release:
            self._closed.append(self._finding(episode, still=False))
            del running[module]

    def _finding(self, e: _Episode, still: bool) -> Finding:
        rule = self._rules[e.rule]
        return Finding(
            rule=e.rule,
            title=rule.title,
            severity="critical" if e.critical else rule.severity,
            site=e.site,
            module=e.module,
            attempt=self.attempt,
            first_step=e.first_step,
            last_step=e.last_step,
            peak_step=e.peak_step,
            open=still,
            count=e.count,
            value=e.value,
            threshold=e.threshold,
            evidence=dict(e.evidence),
            order=e.order,
        )

    def _running(self) -> Iterable[_Episode]:
        for running in self._episodes.values():
            yield from running.values()

    def findings(self) -> list[Finding]:
        """All findings so far, closed and open, in the order of `place`."""
        found = [*self._closed, *(self._finding(e, still=e.sound == 0) for e in self._running() if e.opened)]
        return sorted([*found, *self._audited()[0]], key=place)

    def unjudged(self) -> dict[str, str]:
        """Rules that could not decide anything, or failed, each with the reason in words."""
        reasons, beside = self._audited()[1] | self._failed, self.inapplicable()
        for rule in self._rules.values():
            if rule.check is None or rule.id in reasons or self._judged.get(rule.id):
                continue
            if rule.id in beside:
                reasons[rule.id] = f"not applicable: {rule.needs[0]} was not recorded"
                continue
            ref, least = rule.needs[0], rule.values.get("minimum")
            n = len(self._history[ref].steps) if ref in self._history else 0
            why = f"{n} points of {ref}" if least is None else f"{n} of {least:.0f} points of {ref}"
            if not n:
                why = f"{ref} was not recorded"
            elif least is not None and n >= least:  # it is something else that was missing
                why = f"at none of {n} points of {ref} was all known that it takes"
            reasons[rule.id] = f"not enough evidence: {why}"
        return {rule: reasons[rule] for rule in self._rules if rule in reasons}

    def inapplicable(self) -> tuple[str, ...]:
        """Rules of whose first column nothing was recorded, though others were: what they judge is not in this run."""
        if self._last is None:
            return ()
        timed = (r for r in self._rules.values() if r.check is not None)
        return tuple(r.id for r in timed if r.needs[0] not in self._history and not self._judged.get(r.id))

    def _audited(self) -> tuple[list[Finding], dict[str, str]]:
        """What the rules over facts find, and why those that cannot decide cannot."""
        found, reasons = [], {}
        last = self._last or 0
        for rule in self._rules.values():
            if rule.audit is None:
                continue
            try:
                hits = list(rule.audit(self.facts, rule.values))
            except KeyError as e:
                reasons[rule.id] = f"not enough evidence: the run does not say its {e.args[0]}"
            except Exception as e:
                reasons[rule.id] = f"its audit failed: {type(e).__name__}: {e}"
            else:
                for order, hit in enumerate(hits):
                    e = _Episode(rule.id, rule.site, hit.module, order, first_step=0, last_step=last, count=1)
                    e.value, e.threshold, e.evidence = hit.value, hit.threshold, dict(hit.evidence)
                    found.append(self._finding(e, still=True))
        return found, reasons

    def state(self) -> dict[str, Any]:
        """Everything needed to go on later, as plain JSON (non-finite numbers as ``"nan"``, ``"inf"``, ``"-inf"``)."""
        return {
            "attempt": self.attempt,
            "attempts": list(self._attempts),
            "last_step": self._last,
            "judged": dict(self._judged),
            "failed": dict(self._failed),
            "closed": [_plain(asdict(f)) for f in self._closed],
            "episodes": [_plain(asdict(e)) for e in self._running()],
            "history": {ref: h.state() for ref, h in self._history.items()},
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        self._closed = [_made(Finding, f) for f in state["closed"]]
        episodes = [_made(_Episode, e) for e in state["episodes"] if e["rule"] in self._rules]
        self._attempts = sorted({*state["attempts"], self.attempt})
        if state["attempt"] != self.attempt:
            over = [self._finding(e, still=False) for e in episodes if e.opened]
            self._closed += [_made(Finding, asdict(f) | {"attempt": state["attempt"]}) for f in over]
            return
        for e in episodes:
            self._episodes.setdefault((e.rule, e.site), {})[e.module] = e
        self._last = None if state["last_step"] is None else int(state["last_step"])
        self._judged, self._failed = dict(state["judged"]), dict(state["failed"])
        self._history = {ref: _History.restored(h) for ref, h in state["history"].items()}


def place(f: Finding) -> tuple[int, int, int, int, str, str]:
    """Sort key: earliest first; within a step by site, then in the order in which the step reaches the modules."""
    return f.attempt, f.first_step, SITES.index(f.site), f.order, f.rule, f.module


def rules_hash(rules: Mapping[str, Rule]) -> str:
    """A short name of everything that decides what is found: the rules, their sources and the engine's.

    Returns:
        16 hexadecimal digits; different if any rule, its file, or the code it shares with others differs.
    """
    import monitor.robust
    import monitor.rules

    digest = hashlib.sha256()
    helpers = sorted(str(file) for folder in monitor.rules.__path__ for file in Path(folder).glob("_*.py"))
    for file in (__file__, monitor.robust.__file__, *helpers):
        digest.update("".join(linecache.getlines(file)).encode())
    for rule in rules.values():
        shown = {f.name: getattr(rule, f.name) for f in fields(rule) if f.name not in ("check", "audit", "doc")}
        digest.update(repr(shown).encode())
        decide = rule.check or rule.audit
        assert decide is not None
        code = getattr(decide, "__code__", None)
        if code is not None:
            digest.update("".join(linecache.getlines(code.co_filename, decide.__globals__)).encode())
    return digest.hexdigest()[:16]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


_KINDS = {"str": str, "int": int, "bool": bool, "float": float, "Severity": str}


def _made(kind: type, data: Mapping[str, Any]) -> Any:
    """A `Finding` or `_Episode` from what `_plain` made of it; what lies in a run folder may be anything."""
    numbers = {name: float(data[name]) for name in ("value", "threshold", "score") if name in data}
    made = kind(**{**data, **numbers, "evidence": {str(k): float(v) for k, v in data["evidence"].items()}})
    for f in fields(kind):
        if type(getattr(made, f.name)) is not _KINDS.get(str(f.type), dict):
            raise TypeError(f"{f.name} is {getattr(made, f.name)!r:.40}, expected {f.type}")
    if made.site not in SITES or getattr(made, "severity", "info") not in SEVERITIES:
        raise ValueError(f"no such site or severity: {made.site!r:.40}")
    return made


def _pack(a: npt.NDArray[Any]) -> str:
    return base64.b64encode(a.tobytes()).decode("ascii")


def _unpack(text: str, kind: Any) -> npt.NDArray[Any]:
    return np.frombuffer(base64.b64decode(text, validate=True), dtype=kind)
