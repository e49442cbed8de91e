"""What every command shares: where runs are looked for, how an error is shown, what is written on."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, RenderableType

from monitor.errors import UsageError

USAGE, UNREADABLE = 2, 3

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def runs_folder() -> Path:
    """Where runs are when no path is given: ``./runs``, or the working folder if there is none."""
    runs = Path("runs")
    return runs if runs.is_dir() else Path()


def console() -> Console:
    """Standard output. Nothing is read as markup: names come from other people's programs."""
    return Console(markup=False, highlight=False, emoji=False)


def show(*blocks: RenderableType) -> None:
    """Print blocks below each other, without the blanks that fill lines up."""
    out = console()
    with out.capture() as text:
        out.print(*blocks, sep="\n")
    out.file.write(re.sub(r" +$", "", text.get(), flags=re.MULTILINE))


def one_thread() -> None:
    """Before NumPy is imported: start no threads for matrix products, of which reading a run has none.

    Starting them takes a quarter of the CPU time of `monitor inspect` (0.50 s against 0.38 s).
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@contextmanager
def reported(debug: bool) -> Iterator[None]:
    """Turns an error into one line on standard error and an exit code, or lets it pass if ``debug``."""
    try:
        yield
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except Exception as e:
        if debug:
            raise
        # imported late: `monitor run` must not load what reads runs
        from monitor.diagnosis.text import plain
        from monitor.errors import MonitorError

        expected = isinstance(e, (MonitorError, OSError))
        typer.echo(plain(e) if expected else f"{type(e).__name__}: {plain(e)} (--debug shows where)", err=True)
        raise typer.Exit(USAGE if isinstance(e, UsageError) else UNREADABLE) from e
