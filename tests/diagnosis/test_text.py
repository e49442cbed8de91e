from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from monitor.diagnosis.finding import Finding, Incident, Verdict
from monitor.diagnosis.text import BADGES, duration, number, place, plain, summary_lines, when
from monitor.rule import load_rules

FOUND = Finding("loss_spike", "Loss spike", "warning", "loss", "", 0, 200, 210, 205, False, 3, 9.0, 6.0)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("layers.0.weight", "layers.0.weight"),
        ("größe 層 🙂", "größe 層 🙂"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x9b2J\u202eabc\u200b\u2028", r"\x9b2J\u202eabc\u200b\u2028"),
        ("\udcff", r"\udcff"),
        ("[bold]x[/]", "[bold]x[/]"),
        (12, "12"),
    ],
)
def test_plain(text: object, shown: str) -> None:
    assert plain(text) == shown


def test_plain_keeps_both_ends_of_a_long_name() -> None:
    assert plain("abcdefghij", 6) == "abc…ij"
    for width in range(2, 12):
        shown = plain("abcdefghij", width)
        assert len(shown) == min(width, 10)
        assert shown.startswith("a")
        assert width < 3 or shown.endswith("j")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (1440.0, "1,440"),
        (0.35123, "0.3512"),
        (1.234e-8, "1.23e-08"),
        (1234.5, "1,234"),
        (99999.9, "100,000"),
        (3e9, "3e+09"),
        (-0.5, "-0.5"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
    ],
)
def test_number(value: float, shown: str) -> None:
    assert number(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0.0 s"), (16.24, "16.2 s"), (250, "4 min 10 s"), (3600, "1 h 0 min"), (9060, "2 h 31 min"), (2e5, "2 d 7 h")],
)
def test_duration(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_when_and_where() -> None:
    rules = load_rules()
    assert when(FOUND, None) == "steps 200–210"
    assert when(replace(FOUND, last_step=200), rules["loss_spike"]) == "step 200"
    assert when(replace(FOUND, open=True, first_step=1512), None) == "since step 1,512"
    assert when(FOUND, rules["unoptimized_parameter"]) == "in the wiring"
    assert place(FOUND) == "the whole run"
    assert place(replace(FOUND, module="a\x1bb")) == r"a\x1bb"


class TestSummary:
    def verdict(self, incidents: int) -> Verdict:
        hostile = replace(FOUND, module="\x1b[31m", evidence={"loss": 20.0, "median": 1.0, "z": 9.0})
        return Verdict("warning", "Loss spike.\x07", (Incident(hostile, (), "warning"),) * incidents)

    @pytest.mark.parametrize("level", BADGES)
    def test_nothing_found(self, level: str) -> None:
        lines = summary_lines(Verdict(level, "Text.", ()), "runs/x")  # pyright: ignore[reportArgumentType]
        assert lines == [f"monitor: {BADGES[level]} · Text.", "  monitor inspect runs/x"]

    @pytest.mark.parametrize("incidents", [1, 2, 3, 100])
    def test_a_few_lines_that_are_safe_to_print(self, incidents: int) -> None:
        lines = summary_lines(self.verdict(incidents), "runs/\x1bx")
        assert 3 <= len(lines) <= 8
        assert all(line.isprintable() for line in lines)
        assert lines[-1] == r"  monitor inspect runs/\x1bx"
        assert sum(line.startswith("  do: ") for line in lines) == min(incidents, 2)
        assert ("  … and 98 more" in lines) == (incidents == 100)

    def test_a_rule_of_another_version(self) -> None:
        gone = Incident(replace(FOUND, rule="gone"), (), "warning")
        assert len(summary_lines(Verdict("warning", "Gone.", (gone,)), "x")) == 3

    def test_a_run_gives_its_own_verdict(self) -> None:
        verdict = self.verdict(1)

        class Run:
            def verdict(self) -> Verdict:
                return verdict

        assert summary_lines(Run(), "x") == summary_lines(verdict, "x")  # pyright: ignore[reportArgumentType]


def test_it_needs_no_command_line_library() -> None:
    code = (
        "import sys, monitor.diagnosis.text\n"
        "assert not {'typer', 'rich', 'streamlit', 'torch', 'pandas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
