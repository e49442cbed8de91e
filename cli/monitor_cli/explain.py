"""``monitor explain``: what a metric or a rule is, from its own file."""

from __future__ import annotations

import difflib
from typing import Annotated

import typer

from monitor.errors import UsageError
from monitor_cli.common import Debug, one_thread, reported, show


def explain(
    id_: Annotated[
        str | None,
        typer.Argument(metavar="ID", help="A metric or a rule. Without it, all are listed.", show_default=False),
    ] = None,
    debug: Debug = False,
) -> None:
    """Explain a metric or a rule.

    Definition, units, cost and source of a metric; meaning, thresholds, remedies and limits of a rule.
    """
    with reported(debug):
        one_thread()
        from monitor.metric import load_metrics
        from monitor.rule import load_rules
        from monitor_cli import render

        metrics, rules = load_metrics(), load_rules()
        if id_ is None:
            show(render.catalogue(metrics, rules))
            return
        name = id_.partition(".")[0]  # "grad_norm.norm", as inspect shows it, is a column of grad_norm
        if name in metrics:
            show(render.metric(metrics[name]))
        elif name in rules:
            show(render.rule(rules[name]))
        else:
            near = difflib.get_close_matches(name, [*metrics, *rules], n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(near)}?" if near else "`monitor explain` lists them"
            raise UsageError(f"no metric or rule is called {id_!r}; {hint}")
