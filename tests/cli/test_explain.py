from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from rich.cells import cell_len

from monitor.metric import load_metrics
from monitor.rule import HEADINGS, load_rules
from monitor_cli.app import _ASCII

if TYPE_CHECKING:
    from .conftest import Shell


def words(text: str) -> str:
    """Text whatever its line breaks; code marks are not shown."""
    return " ".join(text.replace("`", "").split())


@pytest.mark.parametrize("name", load_metrics())
def test_a_metric_is_explained_from_its_file(shell: Shell, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    m = load_metrics()[name]
    result = shell("explain", name)
    said = words(result.stdout)
    assert result.exit_code == 0
    for part in (m.id, m.title, m.site, m.source, m.cost, *m.needs, m.doc.split("\n")[0]):
        assert words(part) in said
    for c in m.columns:
        assert f"{m.id}.{c.name} [{c.unit}] {words(c.doc)}" in said


@pytest.mark.parametrize("name", load_rules())
def test_a_rule_is_explained_from_its_file(shell: Shell, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    r = load_rules()[name]
    result = shell("explain", name)
    said = words(result.stdout)
    assert result.exit_code == 0
    parts = [r.id, r.title, r.severity, r.refute, *r.needs, *HEADINGS, r.doc.split("\n")[0]]
    parts += [p.source for p in r.params] + [p.name for p in r.params]
    parts += [x.text for x in r.remedies] + [x.import_path for x in r.remedies]
    for part in parts:
        assert words(part) in said


@pytest.mark.parametrize("name", [*load_metrics(), *load_rules()])
def test_it_fits_80_columns(shell: Shell, name: str) -> None:
    assert max(map(cell_len, shell("explain", name).stdout.splitlines())) <= 80


def test_without_a_name_all_are_listed(shell: Shell) -> None:
    result = shell("explain")
    assert result.exit_code == 0
    for one in (*load_metrics().values(), *load_rules().values()):
        assert words(f"{one.id}") in result.stdout
        assert all(word in result.stdout for word in one.title.split())  # a long one is wrapped


def test_a_column_leads_to_its_metric(shell: Shell) -> None:
    assert shell("explain", "grad_norm.norm").stdout == shell("explain", "grad_norm").stdout


@pytest.mark.parametrize(
    ("name", "hint"), [("grad_nrom", "grad_norm"), ("los_spike", "loss_spike"), ("%%%", "lists them"), ("", "lists")]
)
def test_an_unknown_name_gets_its_neighbours(shell: Shell, name: str, hint: str) -> None:
    result = shell("explain", name)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert hint in result.stderr


def test_every_formula_can_be_read_in_ascii() -> None:
    """Oracle: invariance. No sign that a definition uses becomes a "?" where a terminal knows ASCII only."""
    told = [*(m.doc for m in load_metrics().values()), *(r.doc for r in load_rules().values())]
    signs = {c for text in told for c in text if not c.isascii()}
    assert {c for c in signs if "?" in c.translate(_ASCII).encode("ascii", "replace").decode()} == set()
