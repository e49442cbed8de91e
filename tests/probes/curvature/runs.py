"""What the tests of the curvature of a run read from it, and the dense Hessian they compare it with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

import monitor


def absent(run: monitor.Run) -> dict[str, str]:
    """What was not recorded, and why."""
    return {a["what"]: a["why"] for a in run.info["absent"]}


def column(run: monitor.Run, ref: str, module: str = "") -> list[float]:
    """The values of one series."""
    return run.series(ref, module)[1].tolist()


def dense(loss: Callable[[Tensor], Tensor], at: Tensor) -> np.ndarray:
    """The Hessian in float64."""
    return torch.autograd.functional.hessian(loss, at.double()).numpy()  # pyright: ignore[reportAttributeAccessIssue]
