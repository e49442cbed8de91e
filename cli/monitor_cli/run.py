"""``monitor run``: record an unmodified script."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from monitor_cli.common import USAGE


def run(
    script: Annotated[
        Path, typer.Argument(metavar="SCRIPT", help="The training script, unmodified.", show_default=False)
    ],
    args: Annotated[
        list[str] | None,
        typer.Argument(metavar="ARGS...", help="Everything after SCRIPT is the script's own.", show_default=False),
    ] = None,
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
    if not script.is_file():
        from monitor.diagnosis.text import plain

        what = "is a folder" if script.is_dir() else "does not exist"
        typer.echo(f"monitor run: {plain(script)} {what}; give the path of a Python script", err=True)
        raise typer.Exit(USAGE)
    from monitor.record.launcher import run_script

    raise typer.Exit(run_script(script, args or [], run_dir, curvature, every))
