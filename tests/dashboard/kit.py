"""What several tests of the dashboard ask of a page or a server."""

from __future__ import annotations

import http.client
import json
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from streamlit.testing.v1 import AppTest

SAMPLES = Path(__file__).parents[2] / "sample_runs"


def said(app: AppTest) -> str:
    """All text of a page."""
    assert not app.exception, app.exception
    return "\n".join(h.body for h in app.html) + "\n".join(e.label for e in app.expander)


def charts(app: AppTest) -> list[dict[str, Any]]:
    """The figures on a page, from the top."""
    return [json.loads(c.proto.spec) for c in app.get("plotly_chart")]


def wait_for(condition: Any, what: str, seconds: float = 60) -> None:
    """Return once ``condition()`` holds; fail with ``what`` otherwise."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s in vain until {what}"
        time.sleep(0.1)


def healthy(port: int) -> bool:
    """True once the server answers on ``port``."""
    try:
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=2)) as connection:
            connection.request("GET", "/_stcore/health")
            return connection.getresponse().status == 200
    except OSError:
        return False
