from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch._dynamo
import torch._dynamo.utils


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    """Of what has been compiled, or is to be, elsewhere: there every forward is watched, and no evaluation is."""
    _forget()
    yield
    _forget()


def _forget() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
