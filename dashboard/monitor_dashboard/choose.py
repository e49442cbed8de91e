"""The field in which one of several names is chosen, alike on every page; the address holds the choice."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from monitor_dashboard import markup
from monitor_dashboard.keys import Key


def one_of(key: Key, options: Sequence[str], preferred: str, width: int) -> str:
    """The name that is chosen.

    Args:
        key: of the field, and its name in the address.
        options: at least one.
        preferred: chosen unasked; the first of the options where it is none of them.
        width: pixels.
    """
    index = options.index(preferred) if preferred in options else 0
    return st.selectbox(
        key, options, index=index, key=key, bind="query-params", label_visibility="collapsed", width=width,
        format_func=markup.name,
    )  # fmt: skip
