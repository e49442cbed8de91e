"""What all tests share: one thread, here and in the processes that tests start, so that times and sums are steady."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest

os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="module", autouse=True)
def nothing_of_before() -> None:
    """What was imported, or left by other files, is not searched for garbage, models and optimizers again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    """Of what has been compiled, or is to be, elsewhere: there every forward is watched, and no evaluation is."""
    _forget()
    yield
    _forget()


def _forget() -> None:
    import torch._dynamo
    import torch._dynamo.utils

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def pytest_unconfigure() -> None:
    """At the end everything is garbage again: libraries complain of what is left."""
    gc.unfreeze()
