from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

from monitor.errors import MonitorWarning


@pytest.fixture
def strict() -> Iterator[None]:
    """A site that breaks warns; here that is a failure."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MonitorWarning)
        yield
