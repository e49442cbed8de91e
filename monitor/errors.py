"""The errors a user can meet. Each message says what was received, what was expected and what to do."""

from __future__ import annotations


class MonitorError(Exception):
    """Base of every error this library raises on purpose."""


class UsageError(MonitorError, ValueError):
    """A call cannot be carried out with the arguments it was given."""


class RunFormatError(MonitorError):
    """A folder or file is not a run that this version can read."""


class MetricError(MonitorError):
    """A metric's or a rule's definition breaks the contract of its kind."""


class MonitorWarning(UserWarning):
    """Something could not be recorded; training itself is not affected."""
