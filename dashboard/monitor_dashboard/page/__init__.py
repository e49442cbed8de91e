"""What a page is, and how pages are found: one file of this folder each, nothing else is edited.

It must not be called ``pages``: Streamlit takes the files of a folder of that name beside a script for scripts.
"""

from __future__ import annotations

import sys
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
        render: draws the page for one run; True if it also drew another one that is still being written.
    """

    title: str
    order: int
    render: Callable[[View], bool | None]


def load_pages() -> list[Page]:
    """Every page, in order: the ``PAGE`` of each file of this folder."""
    return sorted((module.PAGE for _, module in walk(sys.modules[__name__])), key=lambda page: page.order)
