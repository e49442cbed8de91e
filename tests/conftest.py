"""What all tests share: one thread, here and in the processes that tests start, so that times and sums are steady."""

from __future__ import annotations

import gc
import os

import pytest

os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="module", autouse=True)
def nothing_of_before() -> None:
    """What was imported, or left by other files, is not searched for garbage, models and optimizers again and again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """At the end everything is garbage again: libraries complain of what is left."""
    gc.unfreeze()
