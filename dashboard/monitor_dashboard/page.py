"""What a page is, and how pages are found: one file of ``monitor_dashboard/pages`` each, nothing else is edited."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from monitor.metric import walk
from monitor_dashboard.data import View


@dataclass(frozen=True)
class Page:
    """One page of the dashboard.

    Attributes:
        title: in the navigation; its lower-case form is the address.
        order: place in the navigation; the smallest opens first.
        render: draws the page for one run.
    """

    title: str
    order: int
    render: Callable[[View], None]


def load_pages() -> list[Page]:
    """Every page, in order: the ``PAGE`` of each file of ``monitor_dashboard/pages``."""
    from monitor_dashboard import pages

    return sorted((module.PAGE for _, module in walk(pages)), key=lambda page: page.order)
