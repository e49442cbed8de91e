"""``monitor compare``: several runs side by side, and where two of them part."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from monitor.errors import RunFormatError, UsageError
from monitor_cli.common import Debug, one_thread, reported, runs_folder, show

if TYPE_CHECKING:
    from monitor.store.run import Run


def compare(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RUN...",
            help="Runs, or folders of runs; the first is the reference. Default: all in ./runs.",
            show_default=False,
        ),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(
            "--show",
            metavar="COLUMN",
            help="Also show the last value of a column, as sharpness.value; again for more.",
            show_default=False,
        ),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Shorten nothing: lay every run over the first.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead; see cli/README.md.")] = False,
    debug: Debug = False,
) -> None:
    """Show runs side by side, and where each parts from the first.

    Of a sweep also how much the learning rate matters, and what attention logits a larger model would have. Of a
    folder, the run begun first is the reference. ``--show`` adds columns to the table: of several modules it shows the
    largest value.
    """
    with reported(debug):
        one_thread()
        # imported late: `monitor run` must not load what reads runs
        from monitor.diagnosis.comparison import PAIRS
        from monitor.diagnosis.comparison import compare as side_by_side
        from monitor_cli import json_compare, render_compare

        opened, unreadable = _opened(runs or [runs_folder()])
        pairs = len(opened) if everything else PAIRS
        found = side_by_side(opened, pairs, columns or ())
        for column in columns or ():
            if not any(column in row.shown for row in found.rows):
                raise UsageError(f"no run has {column}; `monitor explain` lists metrics, `monitor explain ID` columns")
        if json:
            typer.echo(json_compare.dumps(found, unreadable))
        else:
            show(render_compare.screen(found, [run.summary("loss.value") for run in opened], unreadable, everything))


def _opened(paths: list[Path]) -> tuple[list[Run], list[tuple[Path, str]]]:
    """The runs at ``paths``, and those of a folder that cannot be read, with the reason.

    Raises:
        RunFormatError: if a path holds no run, or is one that cannot be read.
        UsageError: if there are not two different runs.
    """
    from monitor.store.find import find_runs
    from monitor.store.run import open_run

    opened: dict[Path, Run] = {}
    unreadable: list[tuple[Path, str]] = []
    for path in paths:
        if not path.is_dir():
            raise RunFormatError(f"{path} is no folder; give runs or folders of runs")
        below = find_runs(path)
        if not below:
            raise RunFormatError(f"{path.resolve()} holds no run; `monitor run SCRIPT` records one")
        for folder in reversed(below):  # begun first, first
            try:
                opened.setdefault(folder.resolve(), open_run(folder))
            except RunFormatError as e:
                if folder == path:
                    raise
                unreadable.append((folder, str(e)))
    if len(opened) < 2:
        why = "all paths are the same run" if len(paths) > 1 and opened else f"{len(opened)} readable run given"
        raise UsageError(f"{why}; a comparison needs two or more")
    return list(opened.values()), unreadable
