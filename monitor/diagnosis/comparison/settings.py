"""What differs between runs before the first step: model, optimizer, hyper-parameters, arguments, versions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from monitor.diagnosis.comparison.table import Row
    from monitor.store.run import Run

_GAP = 16  # characters of an argument that stand for a long one's


def differs(runs: Sequence[Run], rows: Sequence[Row]) -> dict[str, tuple[str, ...]]:
    """The facts that are not the same in all runs."""
    told = [_told(run, row) for run, row in zip(runs, rows, strict=True)]
    if all("arguments" in t for t in told):
        common = set.intersection(*(set(_arguments(run)) for run in runs))
        for t, run in zip(told, runs, strict=True):
            t["arguments"] = " ".join(a for a in _arguments(run) if a not in common)
    keys = dict.fromkeys(k for t in told for k in t)
    found = {k: tuple(t.get(k, "") for t in told) for k in keys}
    if found.get("lr") == found.get("peak lr"):
        found.pop("lr", None)
    return {k: texts for k, texts in found.items() if len(set(texts)) > 1}


def _told(run: Run, row: Row) -> dict[str, str]:
    """Everything known about a run without tensors, as texts."""
    facts = run.facts
    told = {"model": str(facts.get("class", ""))}
    if row.parameters:
        told["parameters"] = f"{row.parameters:,}"
    classes = Counter(str(m.get("class", "?")) for m in facts.get("modules", ())[1:])
    told |= {f"{name} modules": str(n) for name, n in classes.items()}
    dtypes = dict.fromkeys(str(p.get("dtype", "")) for p in facts.get("parameters", ()))
    told["dtype"] = ", ".join(dtypes)
    told["optimizer"] = ", ".join(str(o.get("class", "?")) for o in facts.get("optimizers", ()))
    if row.rate is not None:
        told["peak lr"] = f"{row.rate:g}"
    options = dict.fromkeys(k for g in groups(facts) for k in g if k not in ("parameters", "params"))
    for key in options:
        values = dict.fromkeys(_text(g.get(key)) for g in groups(facts))
        told[f"{key}"] = ", ".join(values)
    rest = {k: v for k, v in facts.items() if k not in ("class", "modules", "parameters", "optimizers", "argv")}
    told |= dict(_leaves("", rest))
    told["script"] = str(run.info["script"])
    if _arguments(run):
        told["arguments"] = " ".join(_arguments(run))
    return told | {f"{k} version": _text(v) for k, v in run.info["versions"].items()}


def groups(facts: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The parameter groups of all optimizers; run.json may come from anywhere."""
    several = [o.get("groups") for o in facts.get("optimizers", ())]
    return [g for groups in several if isinstance(groups, list) for g in groups if isinstance(g, dict)]


def _arguments(run: Run) -> list[str]:
    """The script's arguments, an option together with its value."""
    argv = run.facts.get("argv")
    found: list[str] = []
    waiting = False
    for word in map(str, argv[1:]) if isinstance(argv, list) else ():
        if waiting and not word.startswith("-"):
            found[-1] += f" {word}"
            waiting = False
        else:
            found.append(word)
            waiting = word.startswith("-") and "=" not in word
    return found


def _leaves(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for k, v in value.items():
            yield from _leaves(f"{prefix}{' ' if prefix else ''}{k}", v)
    else:
        yield prefix, _text(value)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return f"({', '.join(_text(v) for v in value[:_GAP])}{', …' if len(value) > _GAP else ''})"
    return str(value)
