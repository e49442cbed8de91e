"""The steps that a page shows: two fields and the address hold them, and dragging over a chart sets them.

They are ours, because a zoom kept by a chart is lost when its data change.
"""

from __future__ import annotations

import math
from typing import Any

import streamlit as st

from monitor_dashboard import figures, markup
from monitor_dashboard.keys import Key


def fields(span: tuple[int, int]) -> tuple[int, int]:
    """Two fields for the first and last step to show, and the steps they mean: an empty field follows the run.

    Args:
        span: first and last step there are.
    """
    first, last = span
    st.html(markup.heading("Steps"), width="content")
    for key, hint in ((Key.FIRST, f"{first:,}"), (Key.LAST, "latest")):
        st.number_input(
            key, min_value=0, value=None, step=1, placeholder=hint, key=key, bind="query-params", width=104,
            label_visibility="collapsed",
        )  # fmt: skip
    asked = st.session_state[Key.FIRST], st.session_state[Key.LAST]
    st.button(
        "whole run", key=Key.WHOLE, type="tertiary", disabled=asked == (None, None), on_click=show, args=(None, None)
    )
    low, high = (limit if wish is None else wish for wish, limit in zip(asked, (first, last), strict=True))
    if low > high or low > last or high < first:
        st.html(markup.line(f"no step {low:,} – {high:,}: this is the whole run"), width="content")
        return first, last
    return max(low, first), min(high, last)


def show(first: int | None, last: int | None) -> None:
    """Choose the steps to show from now on; None follows the run."""
    st.session_state[Key.FIRST], st.session_state[Key.LAST] = first, last


def chart(figure: Any, key: Key) -> None:
    """Show a figure over steps; dragging over it chooses steps."""
    # a chart that has been dragged keeps its selection: a new window gets a new chart
    name = f"{key}-{st.session_state[Key.FIRST]}-{st.session_state[Key.LAST]}"
    st.plotly_chart(
        figure, key=name, theme=None, config=figures.CONFIG, on_select=lambda: _dragged(name), selection_mode="box"
    )


def _dragged(key: str) -> None:
    box = st.session_state[key].selection.box
    if box:
        low, high = sorted(box[0]["x"])
        if math.floor(high) > math.ceil(low):
            show(max(0, math.ceil(low)), math.floor(high))
