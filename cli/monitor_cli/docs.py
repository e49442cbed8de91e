"""Writes METRICS.md, RULES.md and cli/README.md from what the code says: ``python -m monitor_cli.docs [--check]``.

Nothing in them is written by hand. ``--check`` writes nothing and exits 1 if one of them is stale.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from typer.testing import CliRunner

from monitor.diagnosis.text import number
from monitor.metric import Metric, load_metrics
from monitor.rule import Rule, load_rules
from monitor_cli import json_compare, jsonout
from monitor_cli.app import app
from monitor_cli.render import paragraphs

ROOT = Path(__file__).resolve().parents[2]
MADE = "*Written by `make docs` from {}; edit that, not this.*"


def pages() -> dict[str, str]:
    """Every generated file: its path from the repository root, and what must stand in it."""
    return {
        "monitor/METRICS.md": metrics_page(load_metrics()),
        "monitor/RULES.md": rules_page(load_rules()),
        "cli/README.md": cli_page(),
    }


def metrics_page(metrics: Mapping[str, Metric]) -> str:
    """All metrics: a table, then what each file says."""
    lines = ["# Metrics", "", MADE.format("the files in `metrics/`"), ""]
    lines += ["| metric | columns [unit] | site | cost |", "|---|---|---|---|"]
    for m in metrics.values():
        columns = ", ".join(f"`{c.name}` [{c.unit}]" for c in m.columns)
        lines.append(f"| [`{m.id}`](#{m.id}) {_cell(m.title)} | {_cell(columns)} | {m.site} | {_cell(m.cost)} |")
    for m in metrics.values():
        lines += ["", f"## {m.id}", "", *_markdown(m.doc), ""]
        lines += ["| column | unit | |", "|---|---|---|"]
        lines += [f"| `{m.id}.{c.name}` | {_cell(c.unit)} | {_cell(c.doc)} |" for c in m.columns]
        if m.needs:
            lines += ["", f"Computed from {', '.join(f'`{n}`' for n in m.needs)} when asked for, not stored."]
    return "\n".join(lines) + "\n"


def rules_page(rules: Mapping[str, Rule]) -> str:
    """All rules: a table, then what each file says."""
    lines = ["# Rules", "", MADE.format("the files in `rules/`"), ""]
    lines += ["| rule | severity | site | reads |", "|---|---|---|---|"]
    for r in rules.values():
        reads = ", ".join(f"`{n}`" for n in r.needs) or "facts of the run"
        lines.append(f"| [`{r.id}`](#{r.id}) {_cell(r.title)} | {r.severity} | {r.site} | {reads} |")
    for r in rules.values():
        lines += ["", f"## {r.id}", "", *_markdown(r.doc), "", "### Thresholds", ""]
        lines += ["| | value | source |", "|---|---|---|"]
        lines += [f"| `{p.name}` | {number(p.value)} {_cell(p.unit)} | {_cell(p.source)} |" for p in r.params]
        lines += ["", "### Remedies", ""]
        lines += [f"- {x.text}" + (f": `{x.import_path}`" if x.import_path else "") for x in r.remedies]
        lines += ["", f"Refuted if {r.refute}."]
        if r.experimental:
            lines += ["", "Experimental: these thresholds have neither a source nor a calibration yet."]
    return "\n".join(lines) + "\n"


def cli_page() -> str:
    """The help of every command, and what ``--json`` gives."""
    lines = ["# The command `monitor`", "", MADE.format("`monitor --help` and the files in `monitor_cli/`"), ""]
    for name in ("", *(c.callback.__name__ for c in app.registered_commands if c.callback)):
        lines += [f"## monitor {name}".rstrip(), "", "```text", _help(name), "```", ""]
    for command, module in (("inspect", jsonout), ("compare", json_compare)):
        lines += [f"## {command} --json", "", *_markdown(module.__doc__ or ""), ""]
    return "\n".join(lines[:-1]) + "\n"


def _help(name: str) -> str:
    result = CliRunner().invoke(app, [*name.split(), "--help"], prog_name="monitor", terminal_width=80)
    return "\n".join(line.rstrip() for line in result.output.strip().splitlines())


def _markdown(doc: str) -> Iterable[str]:
    for i, (heading, text) in enumerate(paragraphs(doc)):
        if i:
            yield ""
        if heading:
            yield from (f"### {heading}", "")
        yield text.replace("``", "") if text.startswith(" ") else _prose(text)


def _prose(text: str) -> str:
    """Text in which only code is markup: "<" would begin a tag, "*" emphasis."""
    parts = text.replace("``", "`").split("`")
    return "`".join(re.sub(r"([<*])", r"\\\1", p) if i % 2 == 0 else p for i, p in enumerate(parts))


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("<", r"\<")


def main() -> None:
    """Write the pages, or with ``--check`` say which are stale."""
    stale = False
    for name, text in pages().items():
        path = ROOT / name
        if "--check" in sys.argv[1:]:
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                print(f"{name} is stale; run `make docs`", file=sys.stderr)
                stale = True
        else:
            path.write_text(text, encoding="utf-8")
    sys.exit(stale)


if __name__ == "__main__":
    main()
