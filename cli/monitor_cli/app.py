"""The command ``monitor``: one file per command, listed once here. A command's name and help are its function's."""

from __future__ import annotations

import codecs
import io
import sys
from typing import Annotated

import typer

import monitor
from monitor_cli.compare import compare
from monitor_cli.dashboard import dashboard
from monitor_cli.explain import explain
from monitor_cli.inspect_ import inspect
from monitor_cli.run import run

app = typer.Typer(
    name="monitor",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    no_args_is_help=True,
)

# A script's own options follow its name, and "--help" after it is the script's.
app.command(context_settings={"allow_interspersed_args": False})(run)
for command in (inspect, compare, explain, dashboard):
    app.command()(command)

# A terminal that cannot show a sparkline or a formula gets these instead, in place of an error or a "?".
_WORDS = {
    "Σ": "sum", "Θ": "Theta", "α": "alpha", "β": "beta", "γ": "gamma", "ε": "eps", "η": "eta", "θ": "theta",
    "λ": "lambda", "μ": "mu", "π": "pi", "σ": "sigma", "τ": "tau", "∂": "d", "∇": "grad", "√": "sqrt", "‖": "||",
    "ℓ": "l", "²": "^2", "³": "^3", "⁴": "^4", "ᵀ": "^T", "ᵗ": "^t", "₁": "_1", "₂": "_2", "½": "1/2", "≤": "<=",
    "≥": ">=", "≠": "!=", "±": "+-", "⟨": "<", "⟩": ">", "⌈": "ceil(", "⌉": ")", "\N{COMBINING CIRCUMFLEX ACCENT}": "^",
    "é": "e",
}  # fmt: skip
_ASCII = str.maketrans("▁▂▃▄▅▆▇█" + "×·…–—−→■▲◆●○", "_.-:=+*#" + "x.~--->!^+*o") | str.maketrans(_WORDS)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"monitor {monitor.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Record a PyTorch training run, and say what is wrong with it.

    Exit codes: 0 done; 1 a finding at or above --fail-on; 2 wrong usage; 3 a run that cannot be read. With `run`, the
    script's own.
    """


def _ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lookalike = error.object[error.start : error.end].translate(_ASCII)
    return lookalike.encode("ascii", "replace").decode(), error.end


def main() -> None:
    """Run the command line and exit."""
    codecs.register_error("monitor.ascii", _ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="monitor.ascii")
    app()
