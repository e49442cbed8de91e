from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

import monitor
from monitor.metric import load_metrics
from monitor.rule import load_rules
from monitor_cli import app, docs

if TYPE_CHECKING:
    from .conftest import Shell

COMMANDS = ("run", "inspect", "compare", "explain", "dashboard")


def test_the_generated_pages_are_current() -> None:
    stale = [n for n, text in docs.pages().items() if (docs.ROOT / n).read_text(encoding="utf-8") != text]
    assert stale == [], "run `make docs`"


def test_check_says_what_is_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    for folder in ("monitor", "cli"):
        (tmp_path / folder).mkdir()

    def call(*args: str) -> int | str | None:
        monkeypatch.setattr(sys, "argv", ["docs", *args])
        with pytest.raises(SystemExit) as exit_:
            docs.main()
        return exit_.value.code

    assert call("--check")
    assert not call()
    assert not call("--check")
    (tmp_path / "monitor" / "RULES.md").write_text("old")
    capsys.readouterr()
    assert call("--check")
    assert capsys.readouterr().err == "monitor/RULES.md is stale; run `make docs`\n"


def test_every_metric_column_and_rule_is_documented() -> None:
    metrics, rules = docs.metrics_page(load_metrics()), docs.rules_page(load_rules())
    for m in load_metrics().values():
        assert f"\n## {m.id}\n" in metrics
        assert all(f"| `{m.id}.{c.name}` |" in metrics for c in m.columns)
    for r in load_rules().values():
        assert f"\n## {r.id}\n" in rules
        assert all(f"| `{p.name}` |" in rules for p in r.params)


def test_the_commands_are_these_and_all_are_documented(shell: Shell) -> None:
    page = docs.cli_page()
    names = [c.callback.__name__ for c in app.app.registered_commands if c.callback]
    assert tuple(names) == COMMANDS
    for name in COMMANDS:
        text = shell(name, "--help").stdout
        assert f"## monitor {name}\n" in page
        assert text.count("--help") == 1
        for option in re.findall(r"^  (--[a-z-]+)", text, flags=re.MULTILINE):
            assert option in page
            # every option says what it is for
            assert re.search(rf"^  {option}( [A-Z]+)?  +[A-Z]\w", text, flags=re.MULTILINE)


def test_the_pages_name_no_machine_and_no_user() -> None:
    assert not re.search(r"/(root|home|work|tmp|Users)/", "".join(docs.pages().values()))


def test_help_is_calm(shell: Shell) -> None:
    text = shell("--help").stdout
    assert "completion" not in text
    assert not set("╭│╰") & set(text)
    assert max(map(len, text.splitlines())) <= 80
    assert "..." not in text.replace("[ARGS]...", "")


def test_version() -> None:
    result = CliRunner().invoke(app.app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout == f"monitor {monitor.__version__}\n"
