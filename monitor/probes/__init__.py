"""Measurements beyond the ordinary step, for `monitor.attach`: one file each.

monitor.attach(model, curvature="auto")
monitor.attach(model, probes=[OddFraction(inputs)])
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

#: Class -> the file of this folder that defines it; imported when first used, since all of them need torch.
_HOME = {
    "Curvature": "curvature",
    "EmbeddingGini": "embedding_gini",
    "FourierLosses": "fourier",
    "JacobianSpectrum": "jacobian_spectrum",
    "LocalComplexity": "local_complexity",
    "Memorisation": "memorisation",
    "OddFraction": "odd_fraction",
    "Pathways": "pathways",
    "Sources": "sources",
    "TrajectoryKL": "trajectory_kl",
}

__all__ = list(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'monitor.probes' has no attribute {name!r}")
    return getattr(import_module(f"monitor.probes.{_HOME[name]}"), name)
