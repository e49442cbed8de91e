"""What the rules recommend, ready to import: losses and gradient transformations, each with its source and its tests.

A remedy is an ordinary piece of PyTorch. It needs no recorder, and using it changes training on purpose.
"""

from __future__ import annotations

from monitor.remedies.fingerprints import fingerprints
from monitor.remedies.orthogonal_gradient import OrthogonalGradient, orthogonalize_gradients_
from monitor.remedies.qk_norm import QKNorm
from monitor.remedies.spike_aware_clipping import SpikeAwareClipping, clip_spikes_
from monitor.remedies.stablemax import StableMaxCrossEntropy, stablemax, stablemax_cross_entropy
from monitor.remedies.z_loss import z_loss

__all__ = [
    "OrthogonalGradient",
    "QKNorm",
    "SpikeAwareClipping",
    "StableMaxCrossEntropy",
    "clip_spikes_",
    "fingerprints",
    "orthogonalize_gradients_",
    "stablemax",
    "stablemax_cross_entropy",
    "z_loss",
]
