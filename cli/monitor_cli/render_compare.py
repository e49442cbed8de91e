"""What `monitor compare` prints, in the style of `render`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from monitor.diagnosis.comparison import (
    CALIBRATION,
    LOGIT_LIMIT,
    Comparison,
    Difference,
    Parting,
    Row,
    apart,
    first_of_each,
    logged_in,
    same,
    stays,
)
from monitor.diagnosis.text import number, plain
from monitor.store.summary import SeriesSummary
from monitor_cli.render import FEW, MANY, NONFINITE, Frame, badge, caption, labelled, spark

#: Runs that get a column of their own in the table of what differs, and a paragraph on where they part; of more, each
#: distinct value is counted, and each parting is a line.
COLUMNS = 4
#: Logged values that get a column in the table of runs, those of validation first.
LOGGED = 2
NAME, FACT = 18, 28


def screen(
    found: Comparison,
    losses: Sequence[Sequence[SeriesSummary]],
    unreadable: Sequence[tuple[Path, str]],
    everything: bool = False,
) -> RenderableType:
    """All that `monitor compare` shows.

    Args:
        found: the comparison.
        losses: the summaries of each run's losses, in the same order.
        unreadable: runs that could not be read, and why.
        everything: shorten nothing.
    """
    blocks = [_table(found, unreadable, everything), _differs(found, everything)]
    blocks += [_curves(found.rows, [s[0] if s else None for s in losses], everything)]
    if len(found.rows) > COLUMNS and not everything:
        blocks.append(_partings(found))
    else:
        blocks += [_parting(found, p, everything) for p in found.partings]
    if len(found.partings) < len(found.rows) - 1:
        rest = len(found.rows) - 1 - len(found.partings)
        blocks.append(Text(f"{rest} more not laid over the first: name fewer runs, or --all", "dim"))
    blocks += [*_sensitivity(found), *_extrapolation(found)]
    return Group(*[part for b in blocks if b is not None for part in ("", b)][1:])


def _table(found: Comparison, unreadable: Sequence[tuple[Path, str]], everything: bool) -> RenderableType:
    rows = found.rows if everything else found.rows[:MANY]
    logged = logged_in(found.rows, 0.0 if everything else 0.5)[: None if everything else LOGGED]
    shown = list(dict.fromkeys(ref for row in rows for ref in row.shown))
    columns = [
        ("status", [plain(row.status, 12) for row in rows]),
        ("steps", [f"{row.steps:,}" for row in rows]),
        ("loss", ["" if row.loss is None else number(row.loss) for row in rows]),
        *((plain(m, 12), [number(row.logged[m]) if m in row.logged else "" for row in rows]) for m in logged),
        *((_heading(ref), [number(row.shown[ref]) if ref in row.shown else "" for row in rows]) for ref in shown),
        ("peak lr", ["" if row.rate is None else f"{row.rate:g}" for row in rows]),
        ("parameters", [f"{row.parameters:,}" if row.parameters else "" for row in rows]),
    ]
    # what is the same in all leaves its room to what is not
    spare = {"peak lr", "parameters", *(("status", "steps") if shown else ())}
    columns = [c for c in columns if everything or c[0] not in spare or len(set(c[1])) > 1]
    grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
    grid.add_column(no_wrap=True)
    for head, _ in columns:
        grid.add_column(no_wrap=True, justify="left" if head == "status" else "right")
    grid.add_column(no_wrap=True, ratio=1, min_width=22)  # only the title of the trouble may be cut
    grid.add_row(*(Text(head, "dim") for head in ("run", *(head for head, _ in columns), "verdict")))
    for i, row in enumerate(rows):
        verdict = badge(row.level)
        if row.onset is not None:
            verdict.append(f"  step {row.onset:,}", "not bold default")
        if row.head:
            verdict.append(f"  {plain(row.head, 40)}", "not bold default")
        grid.add_row(plain(row.name, NAME), *(texts[i] for _, texts in columns), verdict)
    below: list[RenderableType] = []
    if hidden := len(found.rows) - len(rows):
        below.append(Text(f"… and {hidden} more, --all lists them", "dim"))
    below += [
        Text.assemble(("unreadable ", "red"), f"{plain(path.name, NAME)}: {plain(why, 160)}")
        for path, why in (unreadable if everything else unreadable[:FEW])
    ]
    return Group(grid, *below)


def _heading(ref: str) -> str:
    """A column's own name; that of its metric, where the column is just its value."""
    metric, _, column = ref.partition(".")
    return plain(metric if column == "value" else column, NAME)


def _differs(found: Comparison, everything: bool) -> RenderableType | None:
    if not found.differs:
        return Text("Nothing that is known about the runs differs.", "dim")
    width = 200 if everything else FACT
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, style="dim")
    if len(found.rows) > COLUMNS:
        grid.add_column()
        grid.add_row("differs")
        for fact, texts in found.differs.items():
            counted = {t: texts.count(t) for t in dict.fromkeys(texts)}
            shown = [f"{plain(t, width) or '–'} ×{n}" for t, n in counted.items()]
            if len(shown) > FEW and not everything:
                shown = [*shown[: FEW - 1], f"… and {len(shown) - FEW + 1} more"]
            grid.add_row(plain(fact, NAME), ", ".join(shown))
        return grid
    for _ in found.rows:
        grid.add_column()
    grid.add_row("differs", *(Text(plain(row.name, NAME), "dim") for row in found.rows))
    for fact, texts in found.differs.items():
        grid.add_row(plain(fact, NAME), *(plain(t, width) or "–" for t in texts))
    return grid


def _curves(rows: Sequence[Row], losses: Sequence[SeriesSummary | None], everything: bool) -> RenderableType | None:
    both = [(row, s) for row, s in zip(rows, losses, strict=True) if s is not None]
    shown = both if everything else both[:MANY]
    values = np.concatenate([np.zeros(0, np.float32), *(v for _, s in shown for v in (s.band.min, s.band.max))])
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    log = bool((values >= 0).all() and values.any())
    low, high = float(values[values > 0].min() if log else values.min()), float(values.max())
    frame = Frame(min(int(s.band.steps.min()) for _, s in shown), max(s.last_step for _, s in shown), low, high)
    said = f"{number(low)} to {number(high)}{' on a log scale' if log else ''}"
    grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1, no_wrap=True)
    for row, s in shown:
        grid.add_row(plain(row.name, NAME), _Curve(s, frame, log))
    return Group(Text(f"loss, {said}, steps {frame.first:,} to {frame.last:,}", "dim"), grid)


class _Curve:
    """A series on a frame that several share, as wide as the place it is given, at most 100 cells."""

    def __init__(self, series: SeriesSummary, frame: Frame, log: bool) -> None:
        self.series, self.frame, self.log = series, frame, log

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The line."""
        s, frame = self.series, self.frame
        width = min(options.max_width, 100, frame.last - frame.first + 1)
        steps, where = np.unique(s.band.steps, return_index=True)  # a resumed run may have gone back
        # a bucket lasts until the next one begins: a cell in which none begins shows the one that goes on
        cells = frame.first + np.arange(width) * (frame.last - frame.first + 1) // width
        inside = cells[(cells > steps[0]) & (cells <= s.last_step)]
        going_on = s.band.max[where[np.searchsorted(steps, inside, side="right") - 1]]
        line = spark(
            np.concatenate([s.band.steps, inside]),
            np.concatenate([s.band.max, going_on]),
            s.last_step,
            width,
            self.log,
            frame,
        )
        text = Text(line, "cyan", no_wrap=True)
        text.highlight_regex(NONFINITE, "bold red")
        yield text


def _partings(found: Comparison) -> RenderableType:
    """A line for each run that is the same as the first one for a while, or leaves it later; the rest are counted."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    for _ in range(4):
        grid.add_column(no_wrap=True)
    told = [p for p in found.partings if p.later or p.identical_until is not None or not p.first]
    for p in told:
        until = "" if p.identical_until is None else f"same until {p.identical_until:,}"
        if not p.first:
            until = "identical" if p.series else "nothing in common"
        where = (
            [f"parts at {(d := p.later[0]).step:,}", f"{d.ref} {plain(d.module, NAME)}", apart(d)] if p.later else []
        )
        grid.add_row(plain(found.rows[p.run].name, NAME), *(Text(t, "dim") for t in (until, *where)))
    title = Text.assemble("against ", (plain(found.rows[0].name, NAME), "bold"))
    rest = len(found.partings) - len(told)
    counted = [f"{rest} different from the start and not outside its noise band later"] if rest else []
    lines = [*counted, "name two of them, or --all, for more"]
    return Group(title, *([grid] if told else []), Text("; ".join(lines), "dim"))


def _parting(found: Comparison, p: Parting, everything: bool) -> RenderableType:
    title = Text.assemble(
        (plain(found.rows[p.run].name, NAME), "bold"), " against ", (plain(found.rows[0].name, NAME), "bold")
    )
    rows: list[tuple[RenderableType, RenderableType]] = []
    rows.append((caption("same" if p.series else "aligned"), Text(same(p))))
    if not p.first:
        return Group(title, labelled(rows))
    rows.append((caption("first"), _series(p.first, everything)))
    if p.start:
        rows.append((caption("outside"), Text(f"{len(p.start):,} of {p.judged:,} series from the start", "dim")))
        if everything:
            rows.append(("", _series(p.start, everything)))
    if p.later:
        rows.append((caption("parts"), _series(p.later, everything)))
        if p.identical_until is None:
            rows.append(("", Text(CALIBRATION, "dim")))
    else:
        rows.append((caption("parts"), Text(stays(p), "dim")))
    return Group(title, labelled(rows))


def _series(several: Sequence[Difference], everything: bool) -> RenderableType:
    """Series a line each: where, and how far apart; the first of each metric and the number of others."""
    shown = several if everything else first_of_each(several)[:FEW]
    grid = Table.grid(padding=(0, 2, 0, 0))
    for _ in range(3):
        grid.add_column(no_wrap=True)
    grid.add_column()
    for d in shown:
        grid.add_row(f"step {d.step:,}", d.ref, plain(d.module, NAME), Text(apart(d), "dim"))
    hidden = len(several) - len(shown)
    return Group(grid, Text(f"… and {hidden:,} more series", "dim")) if hidden else grid


def _sensitivity(found: Comparison) -> Iterable[RenderableType]:
    for s in found.sensitivity:
        size = f" at {s.parameters:,} parameters" if len(found.sensitivity) > 1 else ""
        title = Text.assemble(("learning-rate sensitivity", "bold"), f"{size}  {number(s.value)}  best {s.best:g}")
        grid = Table.grid(padding=(0, 2, 0, 0))
        for heading, numbers in (("peak lr", [f"{r:g}" for r in s.rates]), ("loss", [number(v) for v in s.losses])):
            grid.add_row(Text(heading, "dim"), *numbers)
        yield Group(title, grid)


def _extrapolation(found: Comparison) -> Iterable[RenderableType]:
    for e in found.extrapolation:
        rate = f" at peak lr {e.rate:g}" if len(found.extrapolation) > 1 else ""
        title = Text.assemble(("attention logits against size", "bold"), f"{rate}  step {e.step:,}, first block")
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_row(Text("parameters", "dim"), *(f"{n:,}" for n in e.parameters), f"{e.size:,}")
        if math.isnan(e.predicted):
            ahead = Text("sizes too much alike, or a logit not above 0", "dim")
        else:
            ahead = Text(f"{number(e.predicted)} predicted", "bold red" if e.beyond else "bold")
        grid.add_row(Text("largest logit", "dim"), *(number(v) for v in e.logits), ahead)
        yield Group(title, grid)
        if e.beyond:
            yield Text(
                f"above {number(LOGIT_LIMIT)} every run diverged (arXiv 2309.14322): QK-norm before that size", "red"
            )
