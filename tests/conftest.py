"""What all tests share: one thread, here and in the processes that tests start, so that times and sums are steady."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"
