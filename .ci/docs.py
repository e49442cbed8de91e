"""Write the reference pages from the code that they describe: ``python .ci/docs.py``, or ``--check`` to compare only.

METRICS.md and RULES.md come from the files of the metrics and rules, cli/README.md from the commands' own help.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from pathlib import Path

from typer.main import get_group
from typer.testing import CliRunner

from monitor.metric import Metric, load_metrics
from monitor.rule import HEADINGS, Rule, load_rules
from monitor_cli.app import app

ROOT = Path(__file__).parents[1]
NOTE = "<!-- Written by `make docs` from the code: edit that. -->"


def table(*rows: Iterable[str]) -> list[str]:
    """Markdown lines; the first row is the head."""
    cells = [[" ".join(c.split()).replace("|", "\\|") for c in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return [lines[0], "|" + " --- |" * len(cells[0]), *lines[1:], ""]


def metric_section(m: Metric) -> list[str]:
    """Everything a metric's file says."""
    made_of = f"from the pass `{m.reads}`" if m.reads else "from " + ", ".join(f"`{n}`" for n in m.needs)
    return [
        f"## {m.id}",
        "",
        f"{m.title}. Site: {m.site}, {made_of}.",
        "",
        inspect.cleandoc(m.doc),
        "",
        *table(("column", "unit", "what it is"), *((f"`{c.name}`", c.unit, c.doc) for c in m.columns)),
        f"Cost: {m.cost}  ",
        f"Source: {m.source}",
        "",
    ]


def rule_text(doc: str) -> list[str]:
    """A rule's docstring with its four headings as headings, their text no longer indented."""
    lines = inspect.cleandoc(doc).splitlines()
    return [f"### {h}\n" if (h := line.rstrip(":")) in HEADINGS else line.removeprefix("    ") for line in lines]


def rule_section(r: Rule) -> list[str]:
    """Everything a rule's file says."""
    return [
        f"## {r.id}",
        "",
        f"{r.title}. Severity: {r.severity}{', experimental' if r.experimental else ''}. Site: {r.site}.",
        "",
        *rule_text(r.doc),
        "",
        *table(
            ("threshold", "value", "unit", "source"), *((p.name, f"{p.value:g}", p.unit, p.source) for p in r.params)
        ),
        f"Reads {', '.join(f'`{n}`' for n in r.needs) or 'facts'}. Refuted by: {r.refute}",
        "",
        *(f"- {a.text}{f' (`{a.import_path}`)' if a.import_path else ''}" for a in r.remedies),
        "",
    ]


def metrics_page() -> str:
    """METRICS.md: a table of all, then one section each."""
    all_of_them = load_metrics().values()
    rows = (
        (f"[{m.id}](#{m.id})", m.title, ", ".join(f"{c.name} [{c.unit}]" for c in m.columns), m.site)
        for m in all_of_them
    )
    head = ["# Metrics", "", NOTE, "", *table(("metric", "what it is", "columns [unit]", "site"), *rows)]
    return "\n".join([*head, *(line for m in all_of_them for line in metric_section(m))])


def rules_page() -> str:
    """RULES.md: a table of all, then one section each."""
    all_of_them = load_rules().values()
    rows = ((f"[{r.id}](#{r.id})", r.title, r.severity, r.site) for r in all_of_them)
    head = ["# Rules", "", NOTE, "", *table(("rule", "what it finds", "severity", "site"), *rows)]
    return "\n".join([*head, *(line for r in all_of_them for line in rule_section(r))])


def commands_page() -> str:
    """cli/README.md: the help of every command."""

    def help_of(*command: str) -> list[str]:
        answer = CliRunner().invoke(app, [*command, "--help"], prog_name="monitor", terminal_width=100)
        return ["```", *(line.rstrip() for line in answer.output.strip().splitlines()), "```", ""]

    intro = (
        "`monitor` on the command line: one file per command in `monitor_cli`, rendering what `import monitor` gives."
    )
    lines = ["# The command line", "", NOTE, "", intro, "", *help_of()]
    for command in get_group(app).commands:
        lines += [f"## monitor {command}", "", *help_of(command)]
    return "\n".join(lines)


def main() -> int:
    """Write the pages; with ``--check``, name those that differ and return 1."""
    pages = {"METRICS.md": metrics_page(), "RULES.md": rules_page(), "cli/README.md": commands_page()}
    stale = []
    for name, text in pages.items():
        file, text = ROOT / name, text.rstrip() + "\n"
        if file.is_file() and file.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if "--check" not in sys.argv[1:]:
            file.write_text(text, encoding="utf-8")
            print(f"wrote {name}")
    if stale and "--check" in sys.argv[1:]:
        print(f"{', '.join(stale)}: differ from the code; run `make docs`")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
