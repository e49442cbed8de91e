from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
import torch._dynamo
import torch._dynamo.utils

from monitor.errors import MonitorWarning


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    """Of what has been compiled, or is to be, elsewhere: there every forward is watched, and no evaluation is."""
    _forget()
    yield
    _forget()


@pytest.fixture
def strict() -> Iterator[None]:
    """A site that breaks warns; here that is a failure."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MonitorWarning)
        yield


def _forget() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
