"""What ``monitor compare --json`` prints: schema 1, one object.

    schema         1. Keys may be added within a schema; none changes its meaning or goes
    runs           the runs, the reference first: path, name (shortest that tells it from the others), status, steps,
                   first_step, last_step, loss (the last recorded), nonfinite (losses that were), logged (name -> last
                   value), shown (column of --show -> last value, of several modules the largest), rate (peak learning
                   rate), parameters, level and text (of the verdict), onset (step of its worst incident), head (title
                   of that)
    unreadable     runs of a given folder that cannot be read: path, why
    differs        fact -> its text in each run, of the facts that are not equal
    partings       one per run that was laid over the reference: run (its name), series (that both have), judged (of
                   these, with points enough for a band), first_step, last_step (of common steps), identical_until
                   (null: not even the first step is), first (series that differ at the next step, causes before
                   consequences: series, module, site, step, reference, value), start (series outside the reference's
                   noise band from the start, also with low and high), later (those that leave it later, the earliest
                   first)
    sensitivity    learning-rate sensitivity, one per size with three rates: parameters, rates, losses, value (in units
                   of the loss), best (rate)
    extrapolation  largest attention logit of the first block against size, one per learning rate with three sizes:
                   rate, step, parameters, logits, size (ten times the largest), predicted, beyond (true: above 1e4)

NaN and infinities are the strings "nan", "inf" and "-inf", so that every JSON parser reads it. Names stand as they were
recorded; whoever shows them in a terminal must escape them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monitor.diagnosis.comparison import Comparison, Difference
from monitor_cli.jsonout import strict

SCHEMA = 1


def dumps(found: Comparison, unreadable: Sequence[tuple[Path, str]]) -> str:
    """``found`` as one line of strict ASCII JSON."""
    return json.dumps(strict(document(found, unreadable)), allow_nan=False)


def document(found: Comparison, unreadable: Sequence[tuple[Path, str]]) -> dict[str, Any]:
    """``found`` as plain data; numbers may still be NaN or infinite."""
    return {
        "schema": SCHEMA,
        "runs": [dataclasses.asdict(row) | {"path": str(row.path)} for row in found.rows],
        "unreadable": [{"path": str(path), "why": why} for path, why in unreadable],
        "differs": found.differs,
        "partings": [
            dataclasses.asdict(p)
            | {"run": found.rows[p.run].name}
            | {name: [_series(d) for d in getattr(p, name)] for name in ("first", "start", "later")}
            for p in found.partings
        ],
        "sensitivity": [dataclasses.asdict(s) for s in found.sensitivity],
        "extrapolation": [dataclasses.asdict(e) for e in found.extrapolation],
    }


def _series(d: Difference) -> dict[str, Any]:
    told = dataclasses.asdict(d)
    return {"series": told.pop("ref"), **told}
