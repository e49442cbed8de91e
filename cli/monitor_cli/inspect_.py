"""``monitor inspect``: what is wrong with a run, on one screen."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from monitor.errors import RunFormatError, UsageError
from monitor_cli.common import Debug, console, one_thread, reported, runs_folder, show

if TYPE_CHECKING:
    from monitor.store.run import Run
    from monitor_cli.view import View

FOUND = 1
REFRESH_S = 2.0


class Level(StrEnum):
    """A severity as an option's value."""

    INFO = "info"
    WARNING = "warning"
    CRITICAL = "critical"


def inspect(
    run: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN", help="A run, or a folder of runs. Default: the newest in ./runs.", show_default=False
        ),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Shorten nothing: every finding, every number.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead; see cli/README.md.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again as it grows, until the run ends.")] = False,
    fail_on: Annotated[
        Level | None, typer.Option("--fail-on", metavar="LEVEL", help="Exit 1 on info, warning or critical findings.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Say what is wrong with a run, where it began and what to do.

    Of a folder of runs: a table, then the newest in full, which is also the one that --json and --fail-on are about.
    """
    with reported(debug):
        if json and watch:
            raise UsageError("--json and --watch exclude each other; repeat --json instead")
        one_thread()
        # imported late: `monitor run` must not load what reads runs
        from monitor_cli import jsonout, render
        from monitor_cli.view import look

        shown, runs = _choose(runs_folder() if run is None else run)
        if json:
            view = look(shown, everything=True)
            typer.echo(jsonout.dumps(view))
        else:
            if runs and run is not None:
                show(render.runs(runs, everything), "")
            view = _watched(shown, everything) if watch else look(shown, everything)
            show(render.screen(view, everything))
    if fail_on is not None and _at_least(view.verdict.level, fail_on):
        raise typer.Exit(FOUND)


def _choose(path: Path) -> tuple[Run, list[Path]]:
    """The run at ``path``, or the newest readable one of a folder with all that are there, newest first."""
    from monitor.store.find import find_runs
    from monitor.store.run import open_run

    if not path.is_dir():
        raise RunFormatError(f"{path} is no folder; give a run or a folder of runs")
    runs = find_runs(path)
    if not runs:
        raise RunFormatError(f"{path.resolve()} holds no run; `monitor run SCRIPT` records one")
    if runs == [path]:
        return open_run(path), []
    error: RunFormatError | None = None
    for candidate in runs:
        try:
            return open_run(candidate), runs
        except RunFormatError as e:
            error = error or e
    assert error is not None
    raise error


def _watched(run: Run, everything: bool) -> View:
    """Show ``run`` again and again until it ends or Ctrl-C; what was seen last."""
    from rich.live import Live

    from monitor.store.run import open_run
    from monitor_cli import render
    from monitor_cli.view import look

    view = look(run, everything)
    try:
        # transient: while it lives it is cut to the terminal's height; the whole screen is printed at the end
        with Live(console=console(), auto_refresh=False, transient=True) as live:
            while view.run.is_live:
                live.update(render.watched(view, everything), refresh=True)
                time.sleep(REFRESH_S)
                view = look(open_run(run.path, view.run), everything)
    except KeyboardInterrupt:
        pass  # the usual way to leave
    return view


def _at_least(level: str, floor: Level) -> bool:
    order = [*Level]
    return level in order and order.index(Level(level)) >= order.index(floor)
