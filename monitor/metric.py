"""What a metric is: named columns with units, computed in numpy from the statistics that one pass recorded.

A metric is one file in ``monitor/metrics`` whose name is the metric's id and which defines ``METRIC``. Nothing else is
edited to add one: the Parquet columns, ``monitor explain``, METRICS.md, the plots and the contract and oracle tests are
all derived from that file. Metrics know nothing of torch, so the same formula runs in the writer thread of a training
and on an old run.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Literal

import numpy as np
import numpy.typing as npt

from monitor.errors import MetricError

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

#: Places of a training step where tensors are read, in the order in which a step reaches them.
SITES = (
    "input",
    "activation",
    "attention",
    "router",
    "logits",
    "loss",
    "gradient",
    "update",
    "parameter",
    "state",
)


@dataclass(frozen=True)
class Column:
    """One named, typed, united value of a metric. ``unit`` is data ("nats", "fraction", "1", …), never in the name."""

    name: str
    unit: str
    doc: str


@dataclass(frozen=True)
class Plot:
    """How a metric is drawn when nothing else is asked: which column, on which scale, as lines or layer x step map."""

    column: str
    log: bool = False
    kind: Literal["line", "heatmap"] = "line"


@dataclass(frozen=True)
class Case:
    """One oracle of a metric: statistics in, the expected columns out, both written down by hand or computed elsewhere.

    ``stats`` maps a statistic (or, for a derived metric, a ``metric.column``) to a number or a ``(step, module)``
    nested list; ``expected`` maps a column to numbers of the same shape, or ``(step,)`` for a column of the whole run.
    None stands for "nothing was recorded".
    """

    stats: Mapping[str, object]
    expected: Mapping[str, object]
    why: str
    rtol: float = 1e-6
    modules: tuple[str, ...] = ("",)


class Block:
    """Named values over the same steps and modules: what a metric's formula and a rule's check receive.

    Args:
        steps: ``(step,)`` int64, strictly increasing.
        modules: names of the second axis; ``("",)`` for values that belong to the whole run.
        values: name -> ``(step, module)`` float64. NaN and inf are recorded values.
        has: name -> ``(step, module)`` bool, False where nothing was recorded. Missing names mean "everywhere".
    """

    def __init__(
        self,
        steps: npt.NDArray[np.int64],
        modules: tuple[str, ...],
        values: Mapping[str, Array],
        has: Mapping[str, Mask] | None = None,
    ) -> None:
        self.steps = steps
        self.modules = modules
        self._values = dict(values)
        self._has = dict(has or {})

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __getitem__(self, name: str) -> Array:
        """``(step, module)`` float64; NaN where nothing was recorded (ask ``has`` to tell it from a recorded NaN)."""
        return self._values[name]

    def has(self, name: str) -> Mask:
        """``(step, module)`` bool: True where a value was recorded."""
        mask = self._has.get(name)
        return mask if mask is not None else np.ones(self._values[name].shape, dtype=np.bool_)

    @property
    def names(self) -> tuple[str, ...]:
        """The names that can be asked for."""
        return tuple(self._values)


#: A formula's answer for one column: values where the pass was recorded, or values and their own mask. Shape
#: ``(step, module)``, or ``(step,)`` for a column of the whole run.
Result = Array | tuple[Array, Mask]


@dataclass(frozen=True)
class Metric:
    """The definition of something measured.

    A measured metric names the pass whose statistics it ``reads``; a derived metric names the columns it ``needs`` (as
    ``"metric.column"``) and is computed when asked for, never stored.

    Attributes:
        id: file name and public name.
        title: one line for a person.
        site: one of `SITES`.
        columns: what it gives.
        compute: ``Block -> {column: values}``; pure numpy, elementwise over steps (up to ``lookback`` earlier steps).
        source: paper and equation, or "definition".
        cost: what measuring reads and allocates, in words.
        plot: default picture.
        oracle: cases with known answers, run by the tests.
        reads: id of the pass in ``monitor/record/passes``; empty for a derived metric.
        needs: columns a derived metric is computed from.
        lookback: number of earlier steps a derived metric looks at.
    """

    id: str
    title: str
    site: str
    columns: tuple[Column, ...]
    compute: Callable[[Block], Mapping[str, Result]]
    source: str
    cost: str
    plot: Plot
    oracle: Callable[[], Iterable[Case]]
    reads: str = ""
    needs: tuple[str, ...] = ()
    lookback: int = 0
    doc: str = field(default="", compare=False)

    @property
    def derived(self) -> bool:
        """True if the metric is computed from stored columns when asked for."""
        return not self.reads

    def column(self, name: str) -> Column:
        """The column called ``name``.

        Raises:
            MetricError: if the metric has no such column.
        """
        for c in self.columns:
            if c.name == name:
                return c
        raise MetricError(f"{self.id} has no column {name!r}; it has {', '.join(c.name for c in self.columns)}")


_NAME = re.compile(r"[a-z][a-z0-9_]*\Z")


def check_metric(m: object, file: str) -> Metric:
    """Return ``m`` if it keeps the contract of a metric.

    Args:
        m: the object a file calls ``METRIC``.
        file: where it stands, for the message.

    Raises:
        MetricError: naming the file and the clause that is broken.
    """

    def need(ok: bool, clause: str) -> None:
        if not ok:
            raise MetricError(f"{file}: {clause}")

    if not isinstance(m, Metric):
        raise MetricError(f"{file}: METRIC is {type(m).__name__}, expected monitor.metric.Metric")
    need(bool(_NAME.match(m.id)), f"id {m.id!r} is not snake_case")
    need(m.site in SITES, f"site {m.site!r} is none of {', '.join(SITES)}")
    need(bool(m.columns), "no columns")
    need(all(_NAME.match(c.name) for c in m.columns), "column names must be snake_case")
    need(len({c.name for c in m.columns}) == len(m.columns), "two columns share a name")
    need(all(c.unit and c.doc for c in m.columns), "every column needs a unit and a description")
    need(bool(m.reads) != bool(m.needs), "a metric either reads one pass or needs other columns, not both")
    need(all(n.count(".") == 1 for n in m.needs), "needs are written 'metric.column'")
    need(m.plot.column in {c.name for c in m.columns}, f"plot shows unknown column {m.plot.column!r}")
    need(bool(m.source and m.cost), "source and cost must say something")
    need(bool(m.doc) or sys.flags.optimize > 1, "the module docstring must say something")  # -OO takes it away
    return m


def walk(package: ModuleType) -> Iterator[tuple[str, ModuleType]]:
    """Name and module of every public file of ``package``, sorted, wherever its ``__path__`` points."""
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda i: i.name):
        if not info.name.startswith("_"):
            yield info.name, importlib.import_module(f"{package.__name__}.{info.name}")


def load_metrics() -> dict[str, Metric]:
    """Every metric, by id, in alphabetical order: one per file of ``monitor/metrics``.

    Raises:
        MetricError: if a file breaks the contract; the message names it.
    """
    import monitor.metrics as package

    return dict(_load(tuple(package.__path__)))


@cache
def _load(path: tuple[str, ...]) -> dict[str, Metric]:
    # keyed by the package's path, so that a folder added to it is found without clearing anything
    import monitor.metrics as package

    found: dict[str, Metric] = {}
    for name, module in walk(package):
        file = module.__file__ or name
        m = check_metric(getattr(module, "METRIC", None), file)
        if m.id != name:
            raise MetricError(f"{file}: id {m.id!r} differs from the file name {name!r}")
        found[name] = m
    return found
