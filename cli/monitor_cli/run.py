"""``monitor run``: record an unmodified script."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from monitor.errors import UsageError
from monitor_cli.common import USAGE


def run(
    script: Annotated[
        str, typer.Argument(metavar="SCRIPT", help="The training script, unmodified.", show_default=False)
    ],
    args: Annotated[
        list[str] | None,
        typer.Argument(metavar="ARGS...", help="Everything after SCRIPT is the script's own.", show_default=False),
    ] = None,
    module: Annotated[bool, typer.Option("-m", help="SCRIPT is a module's name, as in python -m.")] = False,
    run_dir: Annotated[
        Path | None,
        typer.Option("--run-dir", metavar="DIR", help="Where to record. Default: runs/<script>-<time>."),
    ] = None,
    curvature: Annotated[
        bool, typer.Option("--curvature", help="Measure the loss's curvature too, in at most 5 % of the time.")
    ] = False,
    every: Annotated[
        int,
        typer.Option(
            "--every", metavar="STEPS", min=1, help="Look at gradients, logits and attention only every so many steps."
        ),
    ] = 1,
) -> None:
    """Run a training script unmodified and record it.

    The script sees the arguments, the folder and the __main__ it would see without monitor, and its exit code is kept.
    """
    path = Path(script)
    if not module and not path.is_file() and not (path / "__main__.py").is_file():
        what = "is a folder without a __main__.py" if path.is_dir() else "does not exist"
        _stop(f"{path} {what}; give the path of a Python script, or -m and the name of a module")
    from monitor.record.launcher import find_module, find_script, run_main

    try:
        main = find_module(script) if module else find_script(path)
    except UsageError as e:
        _stop(str(e))
    _forget("rich")
    raise typer.Exit(run_main(main, [main.path if module else script, *(args or [])], run_dir, curvature, every))


def _forget(package: str) -> None:
    """Have the script import ``package`` by itself: this one draws a random number while it is imported."""
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]


def _stop(why: str) -> NoReturn:
    from monitor.diagnosis.text import plain

    typer.echo(f"monitor run: {plain(why)}", err=True)
    raise typer.Exit(USAGE)
