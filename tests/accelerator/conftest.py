"""The emulated device, compiled once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.accelerator import emulated


@pytest.fixture(scope="session")
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the emulated device is; kept from one run of the tests to the next."""
    if emulated.compiler() is None:
        pytest.skip("no C++ compiler")
    cache = getattr(request.config, "cache", None)  # none if pytest is told to leave nothing behind
    return emulated.build(cache.mkdir("emulated") if cache is not None else tmp_path_factory.mktemp("emulated"))
