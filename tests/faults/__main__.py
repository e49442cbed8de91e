"""Train all cases, or some, and print the table: ``python -m tests.faults [--write] [--runs=FOLDER] [NAME…]``.

``--write`` keeps the table. ``--runs`` keeps the runs, and takes those that lie there, to be judged by other rules.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from tests.faults import benchmarks, reports
from tests.faults.judge import OUTCOMES, Outcome, held_out, judge, wilson
from tests.faults.kit import CASES

FOLDER = Path(__file__).parent
assert benchmarks and reports  # they fill the table


def share(k: int, n: int) -> str:
    """``12 of 40 = 30 % (18 to 46)``."""
    low, high = wilson(k, n)
    return f"{k} of {n} = {k / max(n, 1):.0%} ({100 * low:.0f} to {100 * high:.0f})"


def figures(outcomes: list[Outcome]) -> dict[str, str]:
    """The figures of some cases, each with its 95 % interval."""
    n = len(outcomes)
    count = {o: sum(x.faulty == o for x in outcomes) for o in OUTCOMES}
    alarms = sum(bool(x.alarms) for x in outcomes)
    first = sum(x.heads for x in outcomes)
    warned = sum(bool(x.loud) for x in outcomes)
    return {
        "cases": str(n),
        **{o: str(count[o]) for o in OUTCOMES},
        "cause named, of all faults (recall)": share(count["right"], n),
        "cause named at the head of the first incident": share(first, n),
        "cause or symptom named": share(count["right"] + count["partly"], n),
        "a warning at all, of all faults": share(warned, n),
        "right cause, of causes named in faulty and repaired runs (precision)": share(
            count["right"], count["right"] + count["wrong"] + alarms
        ),
        "warnings in repaired runs (false alarms)": share(alarms, n),
    }


def table(outcomes: list[Outcome]) -> str:
    """Figures and cases as Markdown."""
    held = held_out()
    parts = {
        "all": outcomes,
        "held out": [o for o in outcomes if o.name in held],
        "development": [o for o in outcomes if o.name not in held],
    }
    columns = {name: figures(part) for name, part in parts.items()}
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    lines += [f"| {key} | " + " | ".join(c[key] for c in columns.values()) + " |" for key in columns["all"]]
    lines += ["", "| case | half | cause | found | head | repaired |", "|---|---|---|---|---|---|"]
    for o in sorted(outcomes, key=lambda o: (OUTCOMES.index(o.faulty), o.name)):
        case = CASES[o.name]
        source = f"[{o.name}]({case.source.split(' ')[0]})" if case.source.startswith("http") else o.name
        half = "held out" if o.name in held else "development"
        found = f"{o.head or '–'}" + "".join(f", {r}" for r in o.loud if r != o.head)
        alarms = "false alarm: " + ", ".join(o.alarms) if o.alarms else "silent"
        lines.append(f"| {source} | {half} | {', '.join(case.causes)} | {o.faulty} | {found} | {alarms} |")
    return "\n".join(lines) + "\n"


ABOUT = """# How often monitor is right about the cause

*Written by `.venv/bin/python -m tests.faults --write` from the cases in this folder; edit those, not this.*

Faults that people reported in public, each trained anew as reported and as the accepted answer repairs it, on small
data and a CPU, with one seed. They come from the published benchmarks of such faults and from a search for symptoms, so
they are no fair sample of what goes wrong; some answers and settings are inferred, which is said where it is so. The
rules that count as right were written down from the answers before anything was run, those of later rules by what they
say; half of the cases, drawn at random, is kept apart: what is found in it has changed no rule.

- right: the head of the first incident, or a warning, names the cause;
- partly: the head names what the run looks like (a divergence, a value that is not finite), not why;
- silent: nothing is found, or what the repaired run has as well; wrong: the head names another cause;
- false alarm: a warning in the repaired run.

Intervals are 95 % (Wilson).

"""


def main() -> None:
    """Train, print, keep."""
    words = [a for a in sys.argv[1:] if not a.startswith("--")]
    kept = [Path(a.removeprefix("--runs=")) for a in sys.argv[1:] if a.startswith("--runs=")]
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        for name in words or CASES:
            outcome = judge(CASES[name], kept[0] if kept else Path(folder))
            print(json.dumps(asdict(outcome)), file=sys.stderr, flush=True)
            outcomes.append(outcome)
    print(table(outcomes))
    if "--write" in sys.argv:
        (FOLDER / "RESULTS.md").write_text(ABOUT + table(outcomes))
        stored = {o.name: [o.faulty, o.head, *o.alarms] for o in sorted(outcomes, key=lambda o: o.name)}
        (FOLDER / "outcomes.json").write_text(json.dumps(stored, indent=0) + "\n")


if __name__ == "__main__":
    main()
