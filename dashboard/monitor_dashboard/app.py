"""The script that Streamlit runs: picks the run, keeps it current, hands it to the page."""

from __future__ import annotations

from collections.abc import Callable

import streamlit as st

from monitor.errors import MonitorError, RunFormatError
from monitor_dashboard import data, markup, theme
from monitor_dashboard.keys import Key
from monitor_dashboard.page import Page, load_pages

#: Seconds between two looks at a run that is being written.
TICK = 2.0
_TICKING = "ticking"


def main() -> None:
    """Draw the page that the address names."""
    pages = load_pages()
    st.set_page_config(page_title="monitor", layout="wide")
    st.html(theme.css(theme.palette(), navigation=len(pages) > 1))
    shown = [st.Page(_script(p), title=p.title, url_path=p.title.lower(), default=p is pages[0]) for p in pages]
    st.navigation(shown, position="top").run()


def _script(page: Page) -> Callable[[], None]:
    def run() -> None:
        # the interval belongs to the fragment's definition, so whoever changes it runs the script again
        ticking = st.session_state.get(_TICKING, False)
        st.fragment(_body, run_every=TICK if ticking else None)(page, ticking)

    return run


def _body(page: Page, ticking: bool) -> None:
    try:
        wanted = _draw(page, ticking)
    except (MonitorError, OSError) as e:
        st.html(markup.problem(str(e), run=not isinstance(e, RunFormatError | OSError)))
        wanted = True  # it may become readable: a run that is only starting does
    if wanted != ticking:
        _tick(wanted)


def _tick(wanted: bool) -> None:
    """Begin anew, looking again by itself or not."""
    st.session_state[_TICKING] = wanted
    st.rerun()


def _draw(page: Page, ticking: bool) -> bool:
    """Header and page; whether to look again by itself."""
    runs = data.list_runs(data.runs_root())
    picker, state, switch = st.columns([0.24, 0.6, 0.16], vertical_alignment="center")
    with picker:
        name = st.selectbox(
            Key.RUN, list(runs), key=Key.RUN, bind="query-params", label_visibility="collapsed", format_func=markup.name
        )  # fmt: skip
    view = data.view(runs[name])
    state.html(markup.head(view.run))
    if view.run.is_live and not ticking and st.session_state.get(Key.LIVE, True):
        _tick(True)  # before anything large is drawn, which would all be sent twice
    others_live = page.render(view)
    if not (view.run.is_live or others_live):
        return False
    with switch.container(horizontal_alignment="right"):
        return st.toggle("follow the run", value=True, key=Key.LIVE, bind="query-params")


if __name__ == "__main__":
    main()
