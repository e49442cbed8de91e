"""A flight recorder and a doctor for PyTorch training runs.

    import monitor
    monitor.attach(model)                # records, changes nothing, prints the verdict when the run ends
    run = monitor.open("runs/grok")      # what was recorded, and what was found

Importing this package imports neither torch nor pandas: each public name is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from monitor.diagnosis.finding import Finding as Finding
    from monitor.diagnosis.finding import Incident as Incident
    from monitor.diagnosis.finding import Verdict as Verdict
    from monitor.errors import MonitorError as MonitorError
    from monitor.errors import MonitorWarning as MonitorWarning
    from monitor.errors import RunFormatError as RunFormatError
    from monitor.errors import UsageError as UsageError
    from monitor.metric import Metric as Metric
    from monitor.probes.curvature import Curvature as Curvature
    from monitor.record.attach import Handle as Handle
    from monitor.record.attach import attach as attach
    from monitor.rule import Rule as Rule
    from monitor.store.run import Run as Run
    from monitor.store.run import open_run as open  # noqa: A004

__version__ = "0.1.0"

_HOME = {
    "Curvature": "monitor.probes.curvature",
    "Finding": "monitor.diagnosis.finding",
    "Handle": "monitor.record.attach",
    "Incident": "monitor.diagnosis.finding",
    "Metric": "monitor.metric",
    "MonitorError": "monitor.errors",
    "MonitorWarning": "monitor.errors",
    "Rule": "monitor.rule",
    "Run": "monitor.store.run",
    "RunFormatError": "monitor.errors",
    "UsageError": "monitor.errors",
    "Verdict": "monitor.diagnosis.finding",
    "attach": "monitor.record.attach",
    "open": "monitor.store.run:open_run",
}

__all__ = [
    "Curvature",
    "Finding",
    "Handle",
    "Incident",
    "Metric",
    "MonitorError",
    "MonitorWarning",
    "Rule",
    "Run",
    "RunFormatError",
    "UsageError",
    "Verdict",
    "attach",
    "open",
]


def __getattr__(name: str) -> Any:
    if name in ("remedies", "curvature", "probes"):
        return import_module(f"monitor.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'monitor' has no attribute {name!r}")
    module, _, attribute = _HOME[name].partition(":")
    value = getattr(import_module(module), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "curvature", "probes", "remedies", "__version__"])
