"""The house stands as DESIGN and the READMEs say: imports point downwards, the frozen surfaces are as written here."""

from __future__ import annotations

import ast
import dataclasses
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import monitor
import monitor.metric
import monitor.rule

ROOT = Path(__file__).parents[1]
SOURCES = {"monitor": ROOT / "monitor", "monitor_cli": ROOT / "cli/monitor_cli"}
SOURCES["monitor_dashboard"] = ROOT / "dashboard/monitor_dashboard"

#: Where an import may not stand: module prefix -> (forbidden prefixes, whether only at module level).
FORBIDDEN: dict[str, tuple[tuple[str, ...], bool]] = {
    "monitor": (("monitor_cli", "monitor_dashboard", "streamlit", "typer", "plotly"), False),
    "monitor.record.passes": (("monitor.store", "monitor.diagnosis"), False),
    "monitor.curvature": (("monitor.store", "monitor.diagnosis", "monitor.record"), False),
    "monitor.probes": (("monitor.store", "monitor.diagnosis"), False),
    "monitor.remedies": (("monitor.store", "monitor.diagnosis", "monitor.record"), False),
    "monitor.metrics": (("monitor.store", "monitor.diagnosis", "monitor.record"), False),
    "monitor.rules": (("monitor.store", "monitor.diagnosis", "monitor.record"), False),
    "monitor.diagnosis": (("monitor.record", "pandas", "duckdb", "pyarrow"), True),
    "monitor.store": (("monitor.record", "pandas", "duckdb"), True),
    "monitor_cli": (("torch", "pandas", "duckdb", "streamlit", "monitor_dashboard"), False),
    "monitor_dashboard": (("torch", "monitor_cli", "monitor.record"), False),
}

#: The only packages beyond the standard library and this project that these may use.
ONLY_THESE = {
    "monitor.metrics": {"numpy"},
    "monitor.rules": {"numpy"},
    "monitor.metric": {"numpy"},
    "monitor.rule": {"numpy"},
    "monitor.block": {"numpy"},
}

#: The only places that may import torch, and plotly.
MAY_IMPORT = {
    "torch": ("monitor.record", "monitor.probes", "monitor.curvature", "monitor.remedies"),
    "plotly": ("monitor_dashboard.figures",),
}

PUBLIC = [
    "Curvature",
    "Finding",
    "Handle",
    "Incident",
    "Metric",
    "MonitorError",
    "MonitorWarning",
    "Rule",
    "Run",
    "RunFormatError",
    "UsageError",
    "Verdict",
    "attach",
    "open",
]

FIELDS = {
    "metric.Column": "name unit doc",
    "metric.Plot": "column log kind",
    "metric.Case": "stats expected why rtol modules",
    "metric.Metric": "id title site columns compute source cost plot oracle reads needs lookback doc",
    "rule.Param": "name value unit source",
    "rule.Remedy": "text import_path",
    "rule.Hits": "steps modules mask has value threshold evidence critical site backward",
    "rule.FactHit": "module value threshold evidence",
    "rule.Rule": "id title severity site message refute remedies params needs check audit lookback hold release"
    " experimental doc",
}

#: Hosts that a text of this project may point a reader to.
HOSTS = {
    "127.0.0.1",
    "192.0.2.1",  # reserved for documentation
    "arxiv.org",
    "docs.pytorch.org",
    "keepachangelog.com",
    "localhost",
    "semver.org",
    "www.w3.org",
}
#: Hosts where the faults of tests/faults were reported; they are cited there and never called.
REPORTS = {"decodetrail.com", "discuss.pytorch.org", "github.com", "stackoverflow.com"}


def modules() -> Iterator[tuple[str, Path]]:
    """Dotted name and file of every module of the three packages."""
    for package, folder in SOURCES.items():
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            yield ".".join((package, *(p for p in parts if p != "__init__"))), file


def imports(name: str, file: Path) -> Iterator[tuple[str, int, bool]]:
    """What a module imports: dotted name, line, and whether it happens when the module itself is imported."""

    def visit(node: ast.AST, eager: bool) -> Iterator[tuple[str, int, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, eager) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((f"{base}.{alias.name}", node.lineno, eager) for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.orelse:
                yield from visit(child, eager)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from visit(child, eager and not inside)

    yield from visit(ast.parse(file.read_text(encoding="utf-8")), True)


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


@cache
def arrows() -> list[tuple[str, str, int, bool]]:
    """Every import of the three packages: importer, imported, line, eager."""
    return [(name, *found) for name, file in modules() for found in imports(name, file)]


@pytest.mark.parametrize("importer", FORBIDDEN)
def test_imports_point_downwards(importer: str) -> None:
    """Oracle: invariance. No module imports what stands above it or what it must do without."""
    forbidden, only_eager = FORBIDDEN[importer]
    assert any(within(name, importer) for name, _ in modules())
    wrong = [
        f"{name}:{line} imports {imported}"
        for name, imported, line, eager in arrows()
        if within(name, importer) and any(within(imported, f) for f in forbidden) and (eager or not only_eager)
    ]
    assert wrong == []


@pytest.mark.parametrize("importer", ONLY_THESE)
def test_definitions_use_numpy_only(importer: str) -> None:
    """Oracle: invariance. Metrics and rules use the standard library, numpy and this package."""
    allowed = ONLY_THESE[importer] | sys.stdlib_module_names | {"monitor"}
    wrong = [
        f"{name}:{line} imports {imported}"
        for name, imported, line, _ in arrows()
        if within(name, importer) and imported.split(".")[0] not in allowed
    ]
    assert wrong == []


@pytest.mark.parametrize("library", MAY_IMPORT)
def test_heavy_libraries_have_one_place(library: str) -> None:
    """Oracle: invariance. Only the rooms that need torch or plotly import it."""
    wrong = [
        f"{name}:{line}"
        for name, imported, line, _ in arrows()
        if within(imported, library) and not any(within(name, place) for place in MAY_IMPORT[library])
    ]
    assert wrong == []


def test_importing_the_command_needs_no_torch() -> None:
    """Oracle: invariance. Nothing that a command or the dashboard imports at module level records."""
    wrong = [
        f"{name}:{line} imports {imported}"
        for name, imported, line, eager in arrows()
        if eager and within(imported, "monitor.record") and not within(name, "monitor.record")
        if not within(name, "monitor.probes")
    ]
    assert wrong == []


def test_importing_monitor_is_light() -> None:
    """Oracle: planted fault. A fresh interpreter that imports monitor has loaded nothing heavy."""
    code = "import sys, monitor; print(*sorted({'torch', 'pandas', 'duckdb', 'pyarrow', 'numpy'} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert answer.stdout.split() == []


def test_public_names() -> None:
    """Oracle: golden. A new public name is a decision: write it here too."""
    assert monitor.__all__ == PUBLIC
    assert all(getattr(monitor, name) is not None for name in PUBLIC)
    assert set(PUBLIC) <= set(dir(monitor))
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        monitor.atach  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("name", FIELDS)
def test_what_a_metric_and_a_rule_are(name: str) -> None:
    """Oracle: golden. The fields of the definitions; changing them needs a migration of every file that has them."""
    module, _, cls = name.partition(".")
    fields = dataclasses.fields(getattr(getattr(monitor, module), cls))
    assert [f.name for f in fields] == FIELDS[name].split()


def tracked() -> list[Path]:
    """Every file that is or would be committed."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [file for name in answer.stdout.split("\0") if name and (file := ROOT / name).is_file()]


def test_no_machine_is_named() -> None:
    """Oracle: invariance. No file, text or data, holds a path of the machine it was made on."""
    paths = re.compile(rb"(?<![\w.\]}])/(?:home|root|Users|work|mnt)/[\w.-]+/")
    wrong = [f"{f.relative_to(ROOT)}: {m[0]!r}" for f in tracked() for m in paths.finditer(f.read_bytes())]
    assert wrong == []


def test_no_foreign_host() -> None:
    """Oracle: invariance. Texts point to papers and documentation only, and nothing is fetched from elsewhere."""
    address = re.compile(rb"https?://([\w.-]*\w)")
    wrong = [
        f"{f.relative_to(ROOT)}: {host}"
        for f in tracked()
        for match in address.finditer(f.read_bytes())
        if (host := match[1].decode()) not in (HOSTS | REPORTS if "faults" in f.parts else HOSTS)
    ]
    assert wrong == []


def test_lists_of_roots_agree() -> None:
    """Oracle: invariance. Build, tests, types and import sorting see the same three roots."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)
    tool = project["tool"]
    roots = tool["hatch"]["build"]["dev-mode-dirs"]
    assert roots == [".", "cli", "dashboard"]
    assert tool["pytest"]["ini_options"]["pythonpath"] == roots
    assert tool["pyright"]["extraPaths"] == roots
    assert set(roots) <= set(tool["ruff"]["src"])
    packages = [ROOT / p for p in tool["hatch"]["build"]["targets"]["wheel"]["packages"]]
    assert packages == list(SOURCES.values())
    assert [str(p.parent.relative_to(ROOT)) for p in packages] == roots


def test_wheel(tmp_path: Path) -> None:
    """Oracle: golden. What lands in site-packages: three packages and nothing with a generic name."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (points,) = (n for n in names if n.endswith("entry_points.txt"))
        assert "monitor = monitor_cli.app:main" in archive.read(points).decode()
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == set(SOURCES)
    assert "monitor/py.typed" in names
    assert not [n for n in names if n.endswith((".pyc", ".tmp"))]
